"""Configs: what composes, what wins, and that every mistake is one line that says how to put it right."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cheapertraining.config import (
    DataConfig,
    RunConfig,
    check_batch_size,
    check_prepared,
    load_data_config,
    load_run_config,
    planned_tokens,
    resolved_yaml,
    split_duration,
)
from cheapertraining.errors import UserError

YAMLS = Path(__file__).parent.parent / "yamls"
RUN = """
max_duration: 10ba
data: {local: shards, seq_len: 16, sources: {a: {weight: 1}, b: {weight: 3.0}}, probes: {t: {source: a}}}
"""


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN, encoding="utf-8")
    return path


def message(path: Path | str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_run_config(path, overrides)
    return str(caught.value)


# ---- composing ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(path.name for path in YAMLS.glob("*.yaml")))
def test_shipped_runs_load(name: str) -> None:
    config = load_run_config(YAMLS / name)
    assert config.loggers.wandb is not None
    assert config.loggers.wandb.mode == "auto"


def test_sample_run_is_as_documented() -> None:
    config = load_run_config("mixed_pretrain")
    expected = ["wiki", "math", "code", "docs", "chat", "parliament", "faq", "noise"]
    assert list(config.data.sources) == expected
    assert (config.data.seq_len, config.train_loader.global_batch_size, config.max_duration) == (128, 32, "300ba")
    assert config.data.probes["code"].source == "code"
    assert config.algorithms.online_mixing is not None
    assert config.algorithms.online_mixing.strategy == "influence"


def test_same_run_on_web_scale_sources() -> None:
    config = load_run_config("mixed_pretrain", ["compose.data=mixed_pretrain_web", "variables.remote=s3://b/shards"])
    weights = {name: source.weight for name, source in config.data.sources.items()}
    assert weights == {
        "dclm": 0.25, "fineweb_edu": 0.35, "github_code": 0.10, "finemath": 0.15, "slimpajama": 0.15
    }  # fmt: skip
    assert list(config.data.probes) == ["web_edu", "code", "math", "dclm", "diverse", "reasoning"]
    assert config.data.remote == "s3://b/shards"
    assert config.data.probes["reasoning"].source == "reasoning"
    assert config.data.seq_len == 2048


def test_command_line_wins_over_file_and_file_over_part(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text(
        "optimizer: {lr: 0.1, eps: 1.0e-6}\ndata: {local: part, seq_len: 8, sources: {a: {}, b: {}}}\n"
    )
    run = tmp_path / "run.yaml"
    run.write_text("compose: {data: mine}\nmax_duration: 1ba\noptimizer: {lr: 0.2}\ndata: {local: file}\n")
    config = load_run_config(run, ["optimizer.lr=0.3", "data.sources.b.weight=2"])
    assert (config.optimizer.lr, config.optimizer.eps, config.data.local, config.data.seq_len) == (0.3, 1e-6, "file", 8)
    assert {name: source.weight for name, source in config.data.sources.items()} == {"a": 1.0, "b": 2.0}
    assert load_run_config(run).optimizer.lr == 0.2


def test_part_by_path_and_by_command_line(run_yaml: Path, tmp_path: Path) -> None:
    part = tmp_path / "other.yaml"
    part.write_text("data: {tokenizer: there}\n")
    assert load_run_config(run_yaml, [f"compose.data={part}"]).data.tokenizer == "there"


def test_variables(run_yaml: Path) -> None:
    run_yaml.write_text(RUN + "variables: {root: /x, n: 4}\nsave_folder: ${variables.root}/r\nseed: ${variables.n}\n")
    assert load_run_config(run_yaml).save_folder == "/x/r"
    assert load_run_config(run_yaml, ["variables.root=/y", "variables.n=5"]).seed == 5


def test_null_switches_off(run_yaml: Path) -> None:
    run_yaml.write_text(RUN + "loggers: {wandb: {project: p}}\nalgorithms: {gradient_clipping: {threshold: 2}}\n")
    config = load_run_config(run_yaml, ["loggers.wandb=null", "algorithms.gradient_clipping=null"])
    assert config.loggers.wandb is None
    assert config.algorithms.gradient_clipping is None
    on = load_run_config(run_yaml).algorithms.gradient_clipping
    assert on is not None
    assert on.threshold == 2.0


@pytest.mark.parametrize("name", sorted(path.name for path in YAMLS.glob("*.yaml")))
def test_resolved_config_loads_to_the_same(name: str, tmp_path: Path) -> None:
    config = load_run_config(YAMLS / name, ["optimizer.eps=1e-7", "variables.remote=r"])
    (tmp_path / "resolved.yaml").write_text(resolved_yaml(config), encoding="utf-8")
    assert load_run_config(tmp_path / "resolved.yaml") == config


def test_scientific_notation_is_a_number(run_yaml: Path) -> None:
    assert load_run_config(run_yaml, ["optimizer.lr=3e-4"]).optimizer.lr == 3e-4


# ---- mistakes ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optmizer.lr=1", "optmizer (command line): unknown key. Did you mean 'optimizer'?"),
        ("optimizer.lrr=1", "optimizer.lrr (command line): unknown key. Did you mean 'lr'?"),
        (
            "optimizer.learning_rate=1",
            "optimizer.learning_rate (command line): unknown key. Known here: name, lr, betas, eps, weight_decay.",
        ),
        ("parallelism.fdsp2={}", "parallelism.fdsp2 (command line): unknown key. Did you mean 'fsdp2'?"),
        ("data.sources.a.wieght=1", "data.sources.a.wieght (command line): unknown key. Did you mean 'weight'?"),
        ("optimizer.lr=abc", "optimizer.lr (command line): expected a number above 0, found 'abc'."),
        ("optimizer.lr='0.1'", "expected a number above 0, found '0.1'. Write it without quotes."),
        ("optimizer.lr=0", "expected a number above 0, found 0."),
        ("optimizer.lr=.inf", "expected a number above 0, found inf."),
        ("optimizer.betas=[0.9]", "expected a list of 2, each a number from 0 to 0.999999, found [0.9]."),
        ("optimizer.betas=[0.9,2]", "optimizer.betas.1 (command line): expected a number from 0 to 0.999999, found 2."),
        ("data.seq_len=1.5", "data.seq_len (command line): expected a whole number of at least 1, found 1.5."),
        ("data.sources.a.weight=-1", "expected a number of at least 0, found -1."),
        ("data.sources.a.weight=.nan", "expected a number of at least 0, found nan."),
        ("data.sources.a.weight=null", "expected a number of at least 0, found nothing (null)."),
        ("data.sources.a=null", "data.sources.a (command line): expected a mapping with keys among weight,"),
        ("autoresume=yes please", "autoresume (command line): expected true or false, found 'yes please'."),
        ("autoresume=1", "autoresume (command line): expected true or false, found 1."),
        ("device=gpuu", "device (command line): expected one of auto, cpu, gpu, found 'gpuu'. Did you mean 'gpu'?"),
        ("run_name=7", "expected text of letters, digits and . _ -, found 7. Put quotes around it."),
        ("run_name=a/b", "run_name (command line): expected text of letters, digits and . _ -, found 'a/b'."),
        ("save_folder=s3://b", "save_folder (command line): expected text that names a local folder, found 's3://b'."),
        ("train_loader.device_microbatch_size=0", "expected a whole number of at least 1 or auto, found 0."),
        ("max_duration=300", "max_duration (command line): expected a duration (300ba, 10_000tok, 5000sp), found 300."),
        ("max_duration=0ba", "expected a duration (300ba, 10_000tok, 5000sp), found '0ba'."),
        ("max_duration=1.5ba", "expected a duration (300ba, 10_000tok, 5000sp), found '1.5ba'."),
        ("max_duration=3ep", "Epochs (ep) do not exist here: the mixture is sampled endlessly"),
        ("save_interval=1ep", "save_interval (command line): expected a duration (300ba, 10_000tok, 5000sp, 0.1dur)"),
        ("scheduler.warmup=2dur", "scheduler.warmup (command line): expected a duration"),
        ("scheduler.decay=100tok", "scheduler.decay (command line): expected the unit of max_duration (ba) or dur"),
        ("model.max_position_embeddings=8", "expected at least data.seq_len (16), found 8."),
        ("data.probes.t.local=x", "expected either source (its probe split) or local/remote (a folder)."),
        ("data.sources={}", "data.sources"),
        ("seed=${variables.nope}", "seed (command line): Interpolation key 'variables.nope' not found."),
        ("compose.dat=x", "compose.dat: unknown key. Did you mean 'data'?"),
        ("compose.model=llama_tony", "compose.model=llama_tony: no such part."),
        ("nonsense", "nonsense: not an override; expected key=value, as in optimizer.lr=3e-4."),
        ("a.b=[1", "command line: cannot read a.b=[1"),
    ],
)  # fmt: skip
def test_mistake_is_one_line(run_yaml: Path, override: str, expected: str) -> None:
    if override == "data.sources={}":
        run_yaml.write_text(RUN.replace("{a: {weight: 1}, b: {weight: 3.0}}", "{}").replace("{t: {source: a}}", "{}"))
        override, expected = "seed=1", f"data.sources ({run_yaml}): expected at least one source, found none."
    text = message(run_yaml, override)
    assert expected in text
    assert "\n" not in text


def test_all_mistakes_at_once_and_where_they_are(run_yaml: Path) -> None:
    run_yaml.write_text(RUN + "optimizer: {lr: -1}\nsheduler: {}\n")
    lines = message(run_yaml, "data.seq_len=x", "optimizer.eps=abc").splitlines()
    assert sorted(lines) == [
        "data.seq_len (command line): expected a whole number of at least 1, found 'x'.",
        "optimizer.eps (command line): expected a number above 0, found 'abc'.",
        f"optimizer.lr ({run_yaml}): expected a number above 0, found -1.",
        f"sheduler ({run_yaml}): unknown key. Did you mean 'scheduler'?",
    ]


def test_several_mistakes_across_keys(run_yaml: Path) -> None:
    lines = message(
        run_yaml, "autoresume=true", "algorithms.online_mixing.strategy=schedule",
        "algorithms.online_mixing.schedule.points=[{tokens: 0, batch: 1, weights: {a: 1, bb: 2}}]",
    ).splitlines()  # fmt: skip
    assert len(lines) == 3
    assert lines[0].startswith("run_name: autoresume needs one")
    assert lines[1] == (
        "algorithms.online_mixing.schedule.points.0 (command line): expected either tokens or batch, to say when."
    )
    assert lines[2].endswith("weights.bb (command line): no such source. Did you mean 'b'?")


def test_influence_needs_a_probe(run_yaml: Path) -> None:
    run_yaml.write_text(RUN.replace("{t: {source: a}}", "{}"))
    load_run_config(run_yaml, ["algorithms.online_mixing.strategy=static"])
    for name in ("influence", "matching", "grape", "aioli", "skillit"):
        assert f"'{name}' steers towards probes" in message(run_yaml, f"algorithms.online_mixing.strategy={name}")
    assert "'doremi' compares with a reference model" in message(run_yaml, "algorithms.online_mixing.strategy=doremi")


def test_missing_keys_are_named(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("data: {local: x}\n")
    assert message(tmp_path / "run.yaml").splitlines() == [
        "max_duration: missing; expected a duration (300ba, 10_000tok, 5000sp).",
        "data.seq_len: missing; expected a whole number of at least 1.",
        "data.sources: missing; expected a mapping of names to a mapping with keys among weight, local, remote, "
        "max_epochs, from_batch.",
    ]  # fmt: skip


def test_unset_remote_of_the_web_sources_is_one_line() -> None:
    text = message("mixed_pretrain", "compose.data=mixed_pretrain_web")
    assert text.startswith("variables.remote (")
    assert text.endswith("needs a value. Write it there, or give it as variables.remote=…")
    assert "\n" not in text


@pytest.mark.parametrize("content", ["a: [1", "- 1\n- 2", "a: 1\na: 2"])
def test_broken_yaml_names_the_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.yaml").write_text(content)
    assert message(tmp_path / "run.yaml").startswith(f"{tmp_path / 'run.yaml'}: ")


def test_no_such_yaml() -> None:
    assert "Did you mean 'mixed_pretrain'?" in message("mixed_pretran")
    assert message("yamls/nothing.yaml").startswith("yamls/nothing.yaml: no such yaml.")


# ---- the data part alone -----------------------------------------------------------------------------------
def test_data_config_by_name_path_mapping_and_object(tmp_path: Path) -> None:
    by_name = load_data_config("mixed_pretrain")
    assert by_name == load_data_config(YAMLS / "data" / "mixed_pretrain.yaml")
    assert by_name == load_data_config(asdict(by_name))
    assert by_name == load_data_config({"data": asdict(by_name)})
    assert by_name == load_data_config(by_name)
    assert load_data_config(by_name, ["data.sources.wiki.weight=4"]).sources["wiki"].weight == 4.0
    assert by_name.sources["wiki"].weight == 1.0


def test_data_config_of_a_run_yaml(run_yaml: Path) -> None:
    assert load_data_config(run_yaml) == load_run_config(run_yaml).data


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"local": "x", "seq_len": 8, "sorces": {}}, "data.sorces (mapping): unknown key. Did you mean 'sources'?"),
        ({"data": {"local": "x", "seq_len": 8, "sources": {"a": {}}}, "dta": 1}, "dta (mapping): unknown key."),
        ("mixed_pretran", "mixed_pretran: no such yaml."),
    ],
)
def test_bad_data_config(config: dict[str, Any] | str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_data_config(config)
    assert expected in str(caught.value)


# ---- checks before anything heavy --------------------------------------------------------------------------
def test_batch_size_must_be_divisible(run_yaml: Path) -> None:
    config = load_run_config(run_yaml, ["train_loader.global_batch_size=10"])
    check_batch_size(config, 5)
    with pytest.raises(UserError, match=r"global_batch_size: .*\(4\), found 10. Use 8 or 12, or another number"):
        check_batch_size(config, 4)
    with pytest.raises(UserError, match="Use 16, or"):
        check_batch_size(config, 16)


def test_missing_shards_say_what_to_run(tmp_path: Path) -> None:
    data = DataConfig(**(asdict(load_data_config("mixed_pretrain")) | {"local": str(tmp_path)}))
    data = load_data_config(asdict(data))
    with pytest.raises(UserError) as caught:
        check_prepared(data)
    assert str(caught.value) == (
        f"{tmp_path}/wiki/train: no shards here, nor of 7 more sources (no index.json). Run: make sample"
    )
    check_prepared(load_data_config(data, ["data.remote=s3://somewhere"]))


def test_sample_with_other_sources_says_which_config_fits(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text("data:\n  sources:\n    code: {weight: 1.0}\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"use compose.data={tmp_path}/data.yaml"):
        check_prepared(load_data_config("mixed_pretrain", [f"data.local={tmp_path}"]))


@pytest.mark.parametrize(("duration", "tokens"), [("10ba", 10 * 32 * 16), ("1_000tok", 1000), ("5sp", 80)])
def test_planned_tokens(run_yaml: Path, duration: str, tokens: int) -> None:
    assert planned_tokens(load_run_config(run_yaml, [f"max_duration={duration}"])) == tokens


def test_split_duration() -> None:
    assert split_duration("20ba") == (20, "ba")
    assert split_duration("1_000tok") == (1000, "tok")
    assert split_duration("0.1dur") == (0.1, "dur")


def test_loading_imports_nothing_heavy() -> None:
    code = (
        "import sys; from cheapertraining.config import load_run_config; load_run_config('mixed_pretrain');"
        "print([m for m in ('torch', 'composer', 'transformers', 'streaming', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_defaults_hold_their_own_checks(run_yaml: Path) -> None:
    config = load_run_config(run_yaml)
    assert isinstance(config, RunConfig)
    assert load_run_config(run_yaml, ["algorithms.online_mixing={}"]).algorithms.online_mixing is not None
