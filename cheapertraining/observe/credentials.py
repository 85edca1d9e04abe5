"""Where keys are found; nothing here prints one."""

from __future__ import annotations

import netrc
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlparse

__all__ = ["credentials", "has_wandb_key", "wandb_key", "wandb_server"]


def wandb_server(environment: Mapping[str, str]) -> str:
    """The address of W&B's server."""
    return environment.get("WANDB_BASE_URL", "https://api.wandb.ai").rstrip("/")


def wandb_key(environment: Mapping[str, str]) -> tuple[str, str] | None:
    """W&B's key and where it stands, looked for as W&B does: the environment, then the netrc file."""
    if key := environment.get("WANDB_API_KEY"):
        return key, "WANDB_API_KEY"
    host = urlparse(wandb_server(environment)).hostname or ""
    file = Path(environment.get("NETRC") or _home(environment) / ".netrc")
    try:
        login = netrc.netrc(file).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return None
    return None if login is None else (login[2] or "", f"{file} (machine {host})")


def has_wandb_key(environment: Mapping[str, str]) -> bool:
    """Whether W&B would find a key."""
    return wandb_key(environment) is not None


def credentials(environment: Mapping[str, str]) -> dict[str, bool]:
    """By service, whether something is set up to log in with; whether it is valid, only the service knows."""
    home = _home(environment)
    aws = bool(environment.get("AWS_ACCESS_KEY_ID") or environment.get("AWS_PROFILE"))
    hub = Path(environment.get("HF_HOME") or home / ".cache" / "huggingface") / "token"
    google = environment.get("GOOGLE_APPLICATION_CREDENTIALS")
    return {
        "Weights & Biases": has_wandb_key(environment),
        "S3": aws or (home / ".aws" / "credentials").is_file(),
        "Google Cloud Storage": bool(google) or bool(environment.get("GCS_KEY")),
        "Hugging Face": bool(environment.get("HF_TOKEN")) or hub.is_file(),
    }


def _home(environment: Mapping[str, str]) -> Path:
    return Path(environment.get("HOME", "~")).expanduser()
