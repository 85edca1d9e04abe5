"""A server on loopback that answers W&B's client as far as a run needs it, refuses a key, or goes away."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["WandbServer"]


class WandbServer:
    """Serves from a thread until :meth:`vanish` or the end of the ``with``.

    Args:
        key: the one that it takes; with any other the answer is 401.
        forbidden: it takes the key, and does not let its owner begin a run.

    Attributes:
        history: lines of the history it was sent.
    """

    def __init__(self, key: str, forbidden: bool = False) -> None:
        self.key, self.forbidden = key, forbidden
        self.history: list[dict[str, Any]] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            """HTTP/1.0, a connection a request: nothing is left open when the server goes."""

            def do_POST(self) -> None:
                owner._answer(self)

            do_PUT = do_POST

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> WandbServer:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.vanish()

    def vanish(self) -> None:
        """From now on the port refuses."""
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        login = base64.b64decode((request.headers.get("Authorization") or "").removeprefix("Basic ")).decode()
        code, answer = 200, {}
        if request.command == "POST" and login != f"api:{self.key}":
            code, answer = 401, {"errors": [{"message": "user is not logged in"}]}
        elif request.path == "/graphql":
            asked = json.loads(body)
            if self.forbidden and "upsertBucket" in asked["query"]:
                code, answer = 403, {"errors": [{"message": "permission denied"}]}
            else:
                answer = {"data": self._data(asked.get("variables") or {})}
        elif request.path.endswith("/file_stream"):
            lines = json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.history += [json.loads(line) for line in lines]
        text = json.dumps(answer).encode()
        request.send_response(code)
        request.send_header("Content-Length", str(len(text)))
        request.end_headers()
        request.wfile.write(text)

    def _data(self, variables: dict[str, Any]) -> dict[str, Any]:
        """What any of the client's questions asks for, at once: it takes what it needs."""
        project = {"id": "p", "name": "tests", "entity": {"id": "e", "name": "me"}}
        run = {"id": "r", "name": variables.get("name") or "r", "displayName": "r", "config": "{}", "project": project}
        files = [{"name": name, "uploadUrl": f"{self.url}/put/{name}"} for name in variables.get("files") or []]
        return {
            "viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}},
            "serverInfo": {"cliVersionInfo": {"max_cli_version": "0.18.7"}},
            "upsertBucket": {"bucket": run, "inserted": True},
            "createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files},
            "QueryType": {"fields": [{"name": "serverInfo"}, {"name": "viewer"}]},
            "MutationType": {"fields": []},
            "ServerInfoType": {"fields": [{"name": "cliVersionInfo"}]},
        }
