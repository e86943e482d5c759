"""Presets, files and overrides; wrong keys are met with the nearest valid one."""

import json
from pathlib import Path

import pytest

from ssmoe.config.load import RunConfig, load_run, preset, preset_names
from ssmoe.config.model import ParallelConfig


def test_every_preset_loads_and_describes_itself() -> None:
    assert len(preset_names()) >= 17
    for name in preset_names():
        assert preset(name).name == name
        assert preset(name).description


@pytest.mark.parametrize("overrides", ["train.steps=7", {"train.steps": 7}])
def test_overrides_are_a_list(overrides: object) -> None:
    with pytest.raises(TypeError, match=r"overrides is a .*: give a list"):
        preset("mamba-tiny", overrides)  # type: ignore[arg-type]


def test_overrides_reach_every_section() -> None:
    run = preset(
        "moe-mamba-tiny",
        [
            "name=mine",
            "train.steps=7",
            "data.sources=a.txt",
            'data.sources=["b.txt", "c.txt"]',
            "data.isolate_documents=false",
            "train.micro_batch_size=null",
            "model.repeat=2",
            "model.init.scheme=moe_mamba",
            "model.pattern.moe.num_experts=3",
            "model.pattern.0.d_state=9",
        ],
    )
    assert (run.name, run.train.steps, run.data.sources) == ("mine", 7, ("b.txt", "c.txt"))
    assert not run.data.isolate_documents
    assert (run.model.repeat, run.model.init.scheme) == (2, "moe_mamba")
    assert run.model.pattern[0].model_dump()["d_state"] == 9
    assert run.model.pattern[1].model_dump()["num_experts"] == 3


def test_a_pattern_may_be_replaced_whole() -> None:
    run = preset("mamba-tiny", ['model.pattern=[{"kind": "mamba"}, {"kind": "dense", "d_ff": 8}]'])
    assert [layer.kind for layer in run.model.pattern] == ["mamba", "dense"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stps=3", "did you mean train.steps"),
        ("model.patern.moe.top_k=2", "did you mean model.pattern"),
        ("model.pattern.moe.topk=2", "did you mean model.pattern.moe.top_k"),
        ("model.pattern.dense.d_ff=2", "0 to 1, or by kind mamba, moe"),
        ("model.pattern.7.top_k=2", "0 to 1"),
        ("model.init.scal=1", "did you mean model.init.scale"),
        ("learning_rate=1", "did you mean train.learning_rate"),
        ("train.steps.more=1", "steps is a value"),
        ("model.pattern.moe.kind=mamba", "fields belong to its kind: set all layers"),
        ("model.pattern.moe=3", "'model.pattern.moe' is a whole layer: name a field of it"),
        ("train.clip_norm=Infinity", "train.clip_norm: Input should be a finite number"),
        ("model.pattern.mamba.expand=inf", "expand: Input should be a finite number"),
        ("train.threads=100000", "train.threads: Input should be less than or equal to 1024"),
        ("train.steps=many", "train.steps"),
        ("name=../../elsewhere", "name: String should match pattern"),
        ("data.context=0", r"data\.context.*greater than 0.*got 0"),
        ("model.pattern.moe.top_k=90", "lower top_k to at most 8"),
        ("steps", "key=value"),
        ("=3", "key=value"),
    ],
)
def test_refusals(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        preset("moe-mamba-tiny", [override])
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean moe-mamba-25m"):
        preset("moe_mamba_25m")


def test_a_masked_model_carries_no_state() -> None:
    with pytest.raises(ValueError, match=r"set train\.tbptt=null"):
        preset("mot-masked-tiny", ["train.tbptt=2"])


@pytest.mark.parametrize("suffix", [".json", ".toml"])
def test_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mine{suffix}"
    if suffix == ".json":
        path.write_text(preset("demo").model_dump_json())
    else:
        path.write_text('[model]\nvocab_size = 9\nd_model = 8\n[[model.pattern]]\nkind = "mamba"\n')
    run = load_run(str(path), ["train.steps=3"])
    assert run.train.steps == 3
    assert run.name == ("demo" if suffix == ".json" else "mine")


def test_a_written_configuration_reads_back_equal(tmp_path: Path) -> None:
    for name in preset_names():
        run = preset(name)
        assert RunConfig.model_validate(json.loads(run.model_dump_json())) == run


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model\n", "cannot be read"),
        ("[model]\nd_model = 8\n", "vocab_size"),
        ("modle = 1\n", "did you mean model"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_run(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("mine.json", b"[1]", "holds no sections"), ("mine.toml", b"\xff\xfe\x00", "cannot be read")],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_run(str(tmp_path / name))


def test_a_missing_file_says_what_to_give() -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file: nowhere\.toml"):
        load_run("nowhere.toml")


def test_a_section_of_a_layer_can_be_reached() -> None:
    overrides = ["model.pattern.parallel.moe.num_experts=3", "model.pattern.parallel.mamba.d_state=4"]
    layer = preset("moe-mamba-parallel-tiny", overrides).model.pattern[0]
    assert isinstance(layer, ParallelConfig)
    assert (layer.moe.num_experts, layer.mamba.d_state) == (3, 4)
    with pytest.raises(ValueError, match=r"did you mean model.pattern.parallel.moe.num_experts\?"):
        preset("moe-mamba-parallel-tiny", ["model.pattern.parallel.moe.num_expert=3"])


@pytest.mark.parametrize(
    ("preset_name", "override", "message"),
    [
        ("mot-mamba-tiny", "train.batch_size=12", r"12 rows .* groups of 8: set train.batch_size .* to 16"),
        ("mot-mamba-tiny", "train.micro_batch_size=4", "4 rows a forward pass"),
        ("mot-masked-tiny", "data.context=100", "data.context=100 does not fill groups of 8: use 104"),
        ("mot-masked-tiny", "data.isolate_documents=true", "set data.isolate_documents=false"),
        ("mot-masked-tiny", "model.objective=causal", 'set objective="masked"'),
    ],
)
def test_groups_must_fit_the_run(preset_name: str, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preset(preset_name, [override])
