"""Meta's layout: the same model as the Hugging Face checkpoint it was made from, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blt_edge.export.checkpoint import CheckpointError, open_checkpoint
from blt_edge.export.checkpoint_base import check_tensors
from blt_edge.export.meta import huggingface_config, meta_name, patching_mode
from blt_edge.graphs.config import ConfigError, parse_config
from blt_edge.tools.models.random_checkpoint import scaled_config, write_random_checkpoint
from safetensors.numpy import load_file, save_file
from support.meta_layout import meta_args, meta_params, write_meta
from support.torch_only import torch_or_skip, transformers_or_skip

CONFIG = {
    **scaled_config("tiny", hash_vocab=53),
    "encoder_hash_byte_group_nb_functions": 2,
    "encoder_hash_byte_group_size": [3, 5],
    "patching_threshold": 2.5,
    "local_attention_window_len": 32,
}
CONFIG["global_config"] = {**CONFIG["global_config"], "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("huggingface") / "little"
    write_random_checkpoint(folder, CONFIG, choose_threshold=False)
    return folder


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With safetensors only, so that no torch is needed."""
    return write_meta(source, tmp_path_factory.mktemp("meta") / "little", pickled=False)


@pytest.fixture
def with_pickle(source: Path, tmp_path: Path) -> Path:
    """With a pickle of the entropy model, as the released one has."""
    return write_meta(source, tmp_path / "pickled")


@pytest.fixture
def copied(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("layout", "pickled", "pickled_main"),
    [
        ("hub", False, False),
        ("hub", True, False),
        ("hub", True, True),
        ("download", False, False),
        ("download", True, True),
        ("converted", False, False),
    ],
)
def test_it_is_the_same_model(
    layout: str, pickled: bool, pickled_main: bool, source: Path, tmp_path: Path
) -> None:
    folder = write_meta(
        source, tmp_path / "weights" / "meta", pickled=pickled, pickled_main=pickled_main, layout=layout
    )
    with open_checkpoint(source) as expected, open_checkpoint(folder) as got:
        assert (got.name, got.layout) == ("meta", "meta")
        assert parse_config(got.config) == parse_config(expected.config)
        check_tensors(got, parse_config(got.config))
        assert set(got.names()) == set(expected.names())
        for name in expected.names():
            assert got.shape(name) == expected.shape(name)
            np.testing.assert_array_equal(got.tensor(name), expected.tensor(name))
        fused = "model.encoder_hash_tok_embedding.weight"
        for start, stop in ((0, 53), (50, 60), (52, 160), (53, 106), (211, 212), (60, 60), (212, 212)):
            rows = got.rows(fused, start, stop)
            np.testing.assert_array_equal(rows, expected.rows(fused, start, stop))
        assert len(got.sha256()) == 64
        assert got.sha256() != expected.sha256()


def test_the_folder_may_be_here_or_behind_a_link(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entropy model is looked for beside what a person sees."""
    folder = write_meta(source, tmp_path / "weights" / "blt_1b", pickled=False, layout="download")
    monkeypatch.chdir(folder)
    with open_checkpoint(".") as checkpoint:
        assert "model.patcher.norm.weight" in checkpoint.names()
    real = tmp_path / "elsewhere"
    folder.rename(real)
    folder.symlink_to(real)
    with open_checkpoint(folder) as checkpoint:
        assert "model.patcher.norm.weight" in checkpoint.names()


def test_what_is_there_is_named(source: Path, tmp_path: Path) -> None:
    folder = write_meta(source, tmp_path / "hf-weights" / "blt_1b", pickled=False, layout="download")
    refused(folder.parent, f"give the folder of a model: {folder}")
    refused(folder.parent / "entropy_model", "describes an entropy model", "main model")
    (folder / "consolidated.safetensors").rename(tmp_path / "kept")
    refused(folder, "no weights", "consolidated.safetensors")
    (folder / "__0_0.distcp").touch()
    refused(folder, "training run", "bytelatent.checkpoint")
    (folder / "consolidated").mkdir()
    refused(folder, str(folder / "consolidated"))
    (tmp_path / "kept").rename(folder / "consolidated.safetensors")
    shutil.rmtree(folder.parent / "entropy_model")
    refused(folder, "entropy_model", "not beside")


def test_how_the_main_model_was_patched_goes_before_how_the_entropy_model_was_trained(
    source: Path, tmp_path: Path
) -> None:
    """As in Meta's code, which reads the main model's `data.patcher_args`."""
    folder = write_meta(source, tmp_path / "weights" / "meta", pickled=False, layout="download")
    path = folder.parent / "entropy_model" / "params.json"
    params = json.loads(path.read_text())
    params["data"]["patcher_args"]["threshold"] = 9.0
    path.write_text(json.dumps(params))
    with open_checkpoint(folder) as checkpoint:
        assert parse_config(checkpoint.config).patching.threshold == 2.5
    trained = json.loads((folder / "params.json").read_text())
    trained["data"]["patcher_args"]["max_patch_length"] = 9
    (folder / "params.json").write_text(json.dumps(trained))
    with open_checkpoint(folder) as checkpoint:
        assert parse_config(checkpoint.config).patching.max_patch_length == 9
    trained["data"]["patcher_args"]["threshold"] = 9.0
    (folder / "params.json").write_text(json.dumps(trained))
    refused(folder, "patching_threshold", "2.5", "9.0", "data.patcher_args")


def test_the_presented_config_is_one_for_transformers(converted: Path, source: Path) -> None:
    transformers = transformers_or_skip()
    with open_checkpoint(converted) as checkpoint:
        theirs = transformers.BltConfig(**checkpoint.config)
    assert theirs.encoder_config.rope_parameters["rope_theta"] == 500000.0
    assert theirs.patcher_config.rope_parameters["rope_theta"] == 10000.0
    assert theirs.global_config.intermediate_size == CONFIG["global_config"]["intermediate_size"]
    assert theirs.patching_threshold == 2.5


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("local_encoder.tok_embeddings.weight", "local_encoder.embed_tokens.weight"),
        (
            "global_transformer.layers.7.feed_forward.w1.weight",
            "global_transformer.layers.7.mlp.gate_proj.weight",
        ),
        ("global_transformer.token_embedding_projection.weight",) * 2,
        (
            "local_encoder.cross_attn_layers.0.cross_attn_norm_q.weight",
            "local_encoder.cross_attn_layers.0.q_norm.weight",
        ),
    ],
)
def test_names(name: str, expected: str) -> None:
    assert meta_name(name) == f"model.{expected}"


def test_names_of_the_entropy_model() -> None:
    assert meta_name("local_decoder.output.weight") == "lm_head.weight"
    for name, expected in {
        "output.weight": "lm_head.weight",
        "norm.weight": "norm.weight",
        "layers.0.attention.wo.weight": "layers.0.self_attn.o_proj.weight",
    }.items():
        assert meta_name(name, entropy_model=True) == f"model.patcher.{expected}"


def config_of(args: dict[str, Any], params: dict[str, Any] | None = None) -> dict[str, Any]:
    model = parse_config(CONFIG)
    return huggingface_config({**meta_args(model), **args}, params or meta_params(model), {})


@pytest.mark.parametrize("text", ["\x1b[2J", "\u202e", "x" * 5000])
@pytest.mark.parametrize(
    "args",
    [
        {"cross_attn_all_layers_encoder": True, "n_layers_local_encoder": None},
        {"cross_attn_nheads": 4, "n_heads_local_encoder": None},
        {"n_kv_heads": 4, "n_heads_local_decoder": None},
    ],
)
def test_what_a_field_says_is_shown_safely(args: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of({name: text if value is None else value for name, value in args.items()})
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "args",
    [
        {"cross_attn_all_layers_encoder": True, "n_layers_local_encoder": 2},
        {"use_rope": False},
        {"downsampling_by_pooling": "avg"},
        {"cross_attn_init_by_pooling": False},
        {"cross_attn_window_decoder": 4},
        {"cross_attn_nheads": 2},
        {"n_kv_heads": 2},
        {"pm_size": 16},
        {"encoder_hash_byte_group_size": None},
        {"encoder_hash_byte_group_size": "3,x"},
        {"encoder_enable_byte_ngrams": True},
        {"dim_global": None},
        {"patching_threshold": 1.0},
    ],
)
def test_what_the_graphs_cannot_do_is_refused_by_name(args: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"args\.{next(iter(args))}") as caught:
        config_of(args)
    assert "\n" not in str(caught.value)


def test_all_layers_with_one_encoder_layer_are_fine() -> None:
    parsed = parse_config(config_of({"cross_attn_all_layers_encoder": True}))
    assert parsed.encoder_cross_all_layers


def test_the_threshold_may_stand_with_the_entropy_model_alone() -> None:
    rule = parse_config(config_of({"patching_threshold": None})).patching
    assert (rule.mode, rule.threshold) == ("entropy", 2.5)
    params = meta_params(parse_config(CONFIG))
    params["data"] = {}
    assert parse_config(config_of({}, params)).patching.threshold == 2.5
    with pytest.raises(ConfigError, match="patching_threshold"):
        parse_config(config_of({"patching_threshold": None}, params))


def test_patching_rules() -> None:
    assert parse_config(config_of({"monotonicity": True})).patching.monotonic
    assert parse_config(config_of({"patching_threshold_add": 0.3})).patching.threshold_add == 0.3
    assert parse_config(config_of({"max_patch_length": 9})).patching.max_patch_length == 9
    assert parse_config(config_of({"patching_mode": "static", "patch_size": 6.0})).patching.patch_size == 6
    with pytest.raises(ConfigError, match="patch_size"):
        parse_config(config_of({"patching_mode": "static", "patch_size": 4.5}))
    with pytest.raises(ConfigError, match="patching_mode"):
        parse_config(config_of({"patching_mode": "bpe"}))
    assert patching_mode({}, {}) == patching_mode({"patching_mode": None}, {}) == "entropy"
    assert (
        patching_mode({}, {"patching_mode": "space"})
        == patching_mode({"patching_mode": "space"}, {})
        == "space"
    )


def test_windows() -> None:
    model = parse_config(CONFIG)
    args = meta_args(model)
    del args["local_attention_window_len"]
    params = meta_params(model)
    params["entropy_model"]["sliding_window"] = None
    config = parse_config(huggingface_config(args, params, {}))
    assert config.encoder.window == 512
    assert config.patcher is not None
    assert config.patcher.window == 512
    assert parse_config(config_of({"local_attention_window_len": None})).encoder.window is None


def test_a_rule_without_entropies_needs_no_entropy_model(copied: Path) -> None:
    shutil.rmtree(copied / "entropy_model")
    refused(copied, "entropy_model", "missing")
    change(copied / "config.json", patching_mode="space")
    with open_checkpoint(copied) as checkpoint:
        config = parse_config(checkpoint.config)
        check_tensors(checkpoint, config)
    assert config.patching.mode == "space"


def change(path: Path, **args: Any) -> None:
    config = json.loads(path.read_text())
    config["args"].update(args)
    path.write_text(json.dumps(config))


def refused(folder: Path, *words: str) -> None:
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("layout", ["with_pickle", "copied"])
def test_damaged_files(layout: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(layout)
    name = "consolidated.pth" if layout == "with_pickle" else "model.safetensors"
    weights = folder / "entropy_model" / name
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    refused(folder, name)
    weights.write_bytes(b"")
    refused(folder, name)
    weights.unlink()
    refused(folder, "entropy_model", "no weights")
    weights.write_bytes(data)
    params = folder / "entropy_model" / "params.json"
    for text in ("{", "[]", '{"entropy_model": 3}', "{}"):
        params.write_text(text)
        refused(folder, "entropy_model")
    params.unlink()
    refused(folder, "params.json")


def test_missing_hash_table_and_tensor(copied: Path) -> None:
    path = copied / "model.safetensors"
    tensors = load_file(path)
    save_file({key: value for key, value in tensors.items() if "embedding.1." not in key}, path)
    refused(copied, "encoder_hash_tok_embedding.1.weight is missing")
    first = tensors["encoder_hash_tok_embedding.0.weight"]
    save_file({**tensors, "encoder_hash_tok_embedding.x.weight": first}, path)
    refused(copied, "encoder_hash_tok_embedding.x.weight is not a numbered hash table")
    gone = "local_decoder.layers.0.attention.wq.weight"
    save_file({key: value for key, value in tensors.items() if key != gone}, path)
    with (
        open_checkpoint(copied) as checkpoint,
        pytest.raises(
            CheckpointError, match=r"local_decoder\.layers\.0\.self_attn\.q_proj\.weight is missing"
        ),
    ):
        check_tensors(checkpoint, parse_config(checkpoint.config))


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this pickle ran",))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pickle_that_runs_code_is_refused_and_not_run(
    wrapped: bool, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / "entropy_model" / "model.safetensors").unlink()
    path = copied / "entropy_model" / "consolidated.pth"
    if wrapped:
        torch_or_skip().save({"model": {"output.weight": Hostile()}}, path)
    else:
        path.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(CheckpointError, match=r"consolidated\.pth: not a readable file") as caught:
        open_checkpoint(copied)
    # torch's own words advise to run what is in the file, in bold.
    assert str(caught.value).isprintable()
    assert "options" not in str(caught.value)
    assert ("Unsupported global: GLOBAL print" in str(caught.value)) == wrapped
    assert "this pickle ran" not in capsys.readouterr().out


def test_pickles_of_something_else(with_pickle: Path) -> None:
    torch = torch_or_skip()
    path = with_pickle / "entropy_model" / "consolidated.pth"
    torch.save([1, 2], path)
    refused(with_pickle, "consolidated.pth", "expected a dict of tensors")
    torch.save({"norm.weight": torch.ones(3, dtype=torch.int32)}, path)
    with (
        open_checkpoint(with_pickle) as checkpoint,
        pytest.raises(CheckpointError, match=r"torch\.int32, .* allowed: dense"),
    ):
        checkpoint.tensor("model.patcher.norm.weight")
    path.rename(path.with_name("other.pth"))
    with open_checkpoint(with_pickle) as checkpoint:
        assert "model.patcher.norm.weight" in checkpoint.names()
    path.with_name("another.pth").write_bytes(b"")
    refused(with_pickle, "has 2 .pth files")


def test_without_torch_one_line_says_so(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copied / "entropy_model" / "model.safetensors").unlink()
    (copied / "entropy_model" / "consolidated.pth").write_bytes(b"a pickle")
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(copied, "consolidated.pth", "needs torch")
