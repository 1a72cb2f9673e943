"""`parse_config` against transformers' own reading of the same raw configs, and its refusals."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from blt_edge.graphs.config import ACTIVATIONS, ConfigError, parse_config
from blt_edge.graphs.rope import RopeConfig
from blt_edge.runtime.hashing import HashSpec
from blt_edge.runtime.patching import PatchingRule
from blt_edge.tools.models.numpy_patcher import GATES
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rope_cases import PARTS, stack_of
from support.torch_only import transformers_or_skip


def raw(**top: Any) -> dict[str, Any]:
    """A small config that is sound; keyword arguments replace fields or extend sections."""
    config: dict[str, Any] = {
        "model_type": "blt",
        "patcher_config": {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2},
        "encoder_config": {"hidden_size": 32, "num_attention_heads": 4, "hidden_size_global": 64},
        "decoder_config": {"hidden_size": 32, "num_attention_heads": 4, "hidden_size_global": 64},
        "global_config": {"hidden_size": 64, "num_attention_heads": 4},
    }
    for name, value in top.items():
        if name in PARTS:
            config[name].update(value)
        else:
            config[name] = value
    return config


def assert_agrees(config: dict[str, Any]) -> None:
    """Every parsed number equals the attribute that transformers' modules would read."""
    transformers = transformers_or_skip()
    # through JSON, as a file is: transformers changes rope dicts in place, and shared ones would mix
    theirs = transformers.BltConfig(**json.loads(json.dumps(config)))
    ours = parse_config(config)
    for name in PARTS:
        mine, other = stack_of(ours, name), getattr(theirs, name)
        if mine is None:
            assert name == "patcher_config"
            assert not theirs.patch_in_forward
            continue
        assert mine.width == other.hidden_size
        assert mine.layers == other.num_hidden_layers
        assert mine.heads == other.num_attention_heads
        assert mine.kv_heads == other.num_key_value_heads
        assert mine.head_dim == other.hidden_size // other.num_attention_heads
        assert mine.intermediate == other.intermediate_size
        assert mine.norm_eps == other.rms_norm_eps
        assert mine.activation == ACTIVATIONS[other.hidden_act]
        assert mine.max_positions == other.max_position_embeddings
        assert mine.rope.rope_type == other.rope_parameters["rope_type"]
        assert mine.rope.theta == other.rope_parameters["rope_theta"]
    window = theirs.local_attention_window_len
    assert ours.encoder.window == ours.decoder.window == theirs.encoder_config.sliding_window == window
    assert ours.global_stack.window is None
    if ours.patcher is not None:
        assert ours.patcher.window == theirs.patcher_config.sliding_window
    assert ours.cross_attn_k == theirs.cross_attn_k
    assert ours.encoder_cross_all_layers == bool(theirs.encoder_config.cross_attn_all_layers)
    assert ours.decoder_cross_all_layers == bool(theirs.decoder_config.cross_attn_all_layers)
    assert ours.token_projection == (theirs.global_config.encoder_cross_output_size is not None)
    assert list(ours.hash.group_sizes) == theirs.encoder_hash_byte_group_size
    assert ours.hash.functions == theirs.encoder_hash_byte_group_nb_functions
    assert ours.hash.vocab == theirs.encoder_hash_byte_group_vocab
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    if ours.patching.mode == "entropy":
        assert ours.patching.threshold == theirs.patching_threshold
        assert ours.patching.max_patch_length == theirs.max_patch_length


def test_defaults_are_those_of_transformers() -> None:
    assert_agrees({"model_type": "blt"})
    assert_agrees({"model_type": "blt", **dict.fromkeys(PARTS)})
    assert_agrees(raw())


optional_windows = st.none() | st.integers(1, 4096)
ropes = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"rope_theta": st.floats(10.0, 1e6)}),
    st.fixed_dictionaries({"rope_parameters": st.fixed_dictionaries({"rope_theta": st.floats(10.0, 1e6)})}),
    st.fixed_dictionaries(
        {
            "rope_theta": st.floats(10.0, 1e6),
            "rope_parameters": st.just({"rope_type": "linear", "factor": 3.0}),
            "rope_scaling": st.just(None) | st.just({}) | st.just({"type": "default"}),
        }
    ),
    st.fixed_dictionaries({"rope_scaling": st.just({"type": "linear", "factor": 2.0, "rope_theta": 700.0})}),
)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Raw configs that are sound, with every field present or left out."""
    k = draw(st.sampled_from([1, 2, 4]))
    head_dim = draw(st.sampled_from([2, 8, 16]))
    heads = draw(st.sampled_from([2, 4]))
    width = head_dim * heads
    global_width = draw(st.sampled_from([k * width, 3 * width]))

    def part(width: int, heads: int, **more: Any) -> dict[str, Any]:
        fields: dict[str, Any] = {"hidden_size": width, "num_attention_heads": heads, **more, **draw(ropes)}
        choices = {
            "num_key_value_heads": st.sampled_from([None, 0, heads, heads // 2, 1]),
            "num_hidden_layers": st.integers(1, 5),
            "intermediate_size": st.integers(0, 300),
            "rms_norm_eps": st.sampled_from([1e-6, 1e-5, 1e-2]),
            "hidden_act": st.sampled_from(sorted(ACTIVATIONS)),
            "max_position_embeddings": st.integers(1, 1 << 20),
            "dropout": st.sampled_from([0, 0.0, 0.1]),
            "initializer_range": st.just(0.02),
            "sliding_window": optional_windows,
            "cross_attn_all_layers": st.booleans() | st.none(),
        }
        for name, values in choices.items():
            if draw(st.booleans()) and not (name == "cross_attn_all_layers" and "cross_attn_k" not in fields):
                fields[name] = draw(values)
        return fields

    local = {"hidden_size_global": global_width, "cross_attn_k": k}
    config: dict[str, Any] = {
        "model_type": "blt",
        "cross_attn_k": k,
        "patcher_config": part(width, heads),
        "encoder_config": part(width, heads, **local),
        "decoder_config": part(width, 2, **local),
        "global_config": part(global_width, heads),
    }
    choices = {
        "local_attention_window_len": optional_windows,
        "encoder_hash_byte_group_size": st.none() | st.lists(st.integers(1, 12), max_size=6),
        "encoder_hash_byte_group_vocab": st.integers(1, 10**6),
        "encoder_hash_byte_group_nb_functions": st.integers(1, 12),
        "patching_threshold": st.floats(-5, 5),
        "max_patch_length": st.none() | st.integers(1, 30),
        "patch_size": st.integers(1, 9),
        "patch_in_forward": st.booleans() | st.none(),
        "tie_word_embeddings": st.booleans(),
        "patching_batch_size": st.integers(1, 4),
        "rope_parameters": st.just({"rope_theta": 3.0}),
        "max_position_embeddings": st.integers(1, 10**6),
    }
    for name, values in choices.items():
        if draw(st.booleans()):
            config[name] = draw(values)
    return config


@settings(max_examples=60, deadline=None)
@given(configs())
def test_any_sound_config_is_read_as_transformers_reads_it(config: dict[str, Any]) -> None:
    before = copy.deepcopy(config)
    assert_agrees(config)
    assert config == before


def test_converted_checkpoints_unused_fields_are_accepted() -> None:
    unused = {"norm_eps": 1e-6, "attn_impl": "xformers", "attn_bias_type": "local_block_causal", "pm_size": 0}
    config = raw(
        **{name: {**unused, "rope_scaling": {"rope_type": "default"}, "dropout": 0.1} for name in PARTS},
        realtime_patching=True,
        patching_device="cuda",
        monotonicity=False,
        patching_threshold_add=0.0,
        torch_dtype="bfloat16",
        bos_token_id=1,
        quantization_config=None,
        temperature=1.0,
    )
    parsed = parse_config(config)
    assert parsed.encoder.norm_eps == 1e-5
    assert parsed.patching.threshold_add is None
    assert parsed == parse_config(raw())


def at(path: str, value: Any) -> dict[str, Any]:
    """The small config with one field set, "field" or "section.field", and what has to agree with it."""
    section, _, name = path.rpartition(".")
    config = raw()
    (config[section] if section else config)[name] = value
    encoder, decoder, others = config["encoder_config"], config["decoder_config"], config["global_config"]
    if path == "cross_attn_k":
        encoder["cross_attn_k"] = decoder["cross_attn_k"] = value
    if name == "hidden_size" and section in ("encoder_config", "decoder_config"):
        encoder["hidden_size"] = decoder["hidden_size"] = value
    if path == "global_config.hidden_size":
        decoder["hidden_size_global"] = value
    if name == "num_attention_heads" and value != 5:
        config[section]["hidden_size"] = 65536
        if section != "patcher_config":
            encoder["hidden_size"] = decoder["hidden_size"] = 65536
            others["hidden_size"] = decoder["hidden_size_global"] = 65536
    return config


@pytest.mark.parametrize(
    ("path", "good", "bad"),
    [
        ("model_type", ["blt"], ["llama", None]),
        *((f"{part}vocab_size", [260], [259, 261]) for part in ("", "patcher_config.", "encoder_config.")),
        ("vocab_size", [260.0], [260.5]),
        ("cross_attn_k", [1, 64], [0, 65, None]),
        *((f"{part}.cross_attn_k", [2], [1, None]) for part in ("encoder_config", "decoder_config")),
        *((part, [], [[], "x", 3]) for part in PARTS),
        ("local_attention_window_len", [1, 2**31 - 1, None], [0, "512"]),
        ("patcher_config.sliding_window", [1, 2**31 - 1, None], [0]),
        *((f"{part}.hidden_size", [8, 65536], [0, 65544]) for part in PARTS if part != "decoder_config"),
        ("encoder_config.hidden_size", [32.0], [True, 32.5]),
        ("decoder_config.hidden_size_global", [64], [65, 32]),
        *((f"{part}.num_attention_heads", [1, 32768], [0, 5, 65536, 65537]) for part in PARTS),
        *((f"{part}.num_hidden_layers", [1, 1000], [0, 1001]) for part in PARTS),
        *((f"{part}.num_key_value_heads", [0, 1, 2, 4, None], [-1, 3, 65537]) for part in PARTS),
        *((f"{part}.intermediate_size", [0, 1, 16 * 65536, None], [-1, 16 * 65536 + 1]) for part in PARTS),
        *((f"{part}.rms_norm_eps", [1e-30, 0.999], [0.0, 1.0, math.nan, "1e-5"]) for part in PARTS),
        *((f"{part}.hidden_act", ["relu"], ["prelu", None]) for part in PARTS),
        *((f"{part}.rope_theta", [1.001, None], [1.0, 0.0, -1.0]) for part in PARTS),
        *((f"{part}.max_position_embeddings", [1, 2**31 - 1], [0, 2**31]) for part in PARTS),
        ("patcher_config.head_dim", [12, None], [6, 0]),
        ("encoder_config.head_dim", [8, None], [4, "8"]),
        ("encoder_config.cross_attn_all_layers", [True, None], [1]),
        ("encoder_hash_byte_group_size", [[1], [64], [3] * 64, [3.0]], [[0], [65], [3] * 65, [3, "4"], 3]),
        ("encoder_hash_byte_group_nb_functions", [1, 64], [0, 65]),
        ("encoder_hash_byte_group_vocab", [1, 2**31 - 1], [0, 2**31, None]),
        ("patching_mode", ["space"], ["bpe"]),
        ("patching_threshold", [2], [None, math.inf]),
        ("max_patch_length", [1, None], [0]),
        ("patch_size", [1], [0, None]),
        ("trained_context", [1, 8192], [0, 8193]),
        *((f"{part}.unknown", [None, 0], [1]) for part in PARTS),
        ("quantization_config", [None], [{"bits": 4}]),
        ("encoder_config.attention_bias", [False], [True]),
        ("global_config.per_layer_config", [{}], [{"0": {}}]),
        ("bad\nname", [0], [1]),
        *((f"{part}.rope_scaling", [{"type": "default"}], [{"type": "longrope"}]) for part in PARTS),
        (
            "patcher_config.rope_parameters",
            [{"rope_type": "linear", "factor": 2}],
            [{"mrope_section": [1]}, 3],
        ),
    ],
)
def test_every_bound_is_where_it_should_be(path: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        parse_config(at(path, value))
    for value in bad:
        with pytest.raises(ConfigError) as caught:
            parse_config(at(path, value))
        assert repr(path)[1:-1] in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 300


def test_windows_missing_and_null() -> None:
    for change, wanted in (
        ({}, (512, 512, 512)),
        ({"local_attention_window_len": None, "patcher_config": {"sliding_window": None}}, (None,) * 3),
        ({"encoder_config": {"sliding_window": 3}}, (512, 512, 512)),
    ):
        parsed = parse_config(raw(**change))
        assert parsed.patcher is not None
        assert (parsed.patcher.window, parsed.encoder.window, parsed.decoder.window) == wanted


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_value_in_any_field_is_used_or_refused_in_one_line(data: st.DataObject) -> None:
    config = raw(patching_threshold_add=0.0, monotonicity=False, local_attention_window_len=5)
    section = data.draw(st.sampled_from([None, *PARTS]))
    target = config if section is None else config[section]
    fields = [*target, "rope_scaling", "rope_parameters", "hidden_act", "intermediate_size", "patch_size"]
    target[data.draw(st.sampled_from(fields))] = data.draw(json_values)
    lines = 1
    try:
        parse_config(config)
    except ConfigError as error:
        lines = len(str(error).splitlines())
    assert lines == 1


def test_every_activation_names_transformers_function() -> None:
    torch = pytest.importorskip("torch")
    from transformers.activations import ACT2FN

    gelus = {
        f"gelu{kind}"
        for kind in ("", "_python", "_new", "_fast", "_accurate", "_pytorch_tanh", "_python_tanh")
    }
    others = {"silu", "swish", "quick_gelu", "relu", "relu2", "sigmoid", "tanh", "linear"}
    assert set(ACTIVATIONS) == gelus | others
    x = np.linspace(-5, 5, 41)
    for name, ours in ACTIVATIONS.items():
        wanted = ACT2FN[name](torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(GATES[ours](x), wanted, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("section", "names"),
    [
        (None, "rope_parameters rope_scaling rope_theta partial_rotary_factor max_position_embeddings"),
        (None, "sliding_window norm_eps attn_impl temperature bos_token_id architectures"),
        ("global_config", "vocab_size"),
        *(
            (part, "sliding_window tie_word_embeddings encoder_cross_output_size norm_eps initializer_range")
            for part in ("encoder_config", "decoder_config", "global_config")
        ),
        *((part, "original_max_position_embeddings") for part in PARTS),
        ("encoder_config", "hidden_size_global"),
    ],
)
def test_fields_without_effect_may_be_set(section: str | None, names: str) -> None:
    plain = parse_config(raw())
    for name in names.split():
        found = parse_config(raw(**({name: 7} if section is None else {section: {name: 7}})))
        assert found == plain, name


def test_every_field_that_transformers_writes_is_known() -> None:
    transformers = transformers_or_skip()
    whole = transformers.BltConfig(tie_word_embeddings=True).to_dict()
    for section in (None, *PARTS):
        for name in whole if section is None else whole[section]:
            if name in PARTS:
                continue
            message = ""
            try:
                parse_config(raw(**({name: ["odd"]} if section is None else {section: {name: ["odd"]}})))
            except ConfigError as error:
                message = str(error)
            assert "not known" not in message, (section, name)


def test_what_converters_write_beside_the_fields_of_transformers_has_no_effect() -> None:
    spec = {"local_attention_window_len": 512, "patch_size": 4.5, "entropy_sliding_window": 512}
    others = {
        "unsloth_version": "2026.1",
        "transformers.js_config": {"dtype": "q4"},
        "attention_dropout": 0.1,
    }
    assert parse_config(raw(original_spec=spec, **others)) == parse_config(raw())
    with pytest.raises(ConfigError, match=r"quantization_config.*quantized from"):
        parse_config(raw(quantization_config={"bits": 4}))


def test_parameters_of_another_rope_type_may_stay_behind() -> None:
    names = (
        "factor original_max_position_embeddings low_freq_factor high_freq_factor attention_factor beta_fast "
        "beta_slow mscale mscale_all_dim truncate short_factor long_factor"
    )
    left = {"rope_type": "default", **dict.fromkeys(names.split(), 7), "type": "yarn"}
    for section in PARTS:
        assert parse_config(raw(**{section: {"rope_parameters": left}})) == parse_config(raw())


def test_what_is_left_out_has_the_released_model_s_size() -> None:
    config = parse_config({"model_type": "blt"})
    assert (config.vocab_size, config.cross_attn_k, config.trained_context) == (260, 2, 4096)
    assert config.hash == HashSpec((3, 4, 5, 6, 7, 8), 1, 500002)
    assert config.patching == PatchingRule("entropy", 1.335442066192627)
    stacks = (config.patcher, config.encoder, config.global_stack, config.decoder)
    assert [
        (s.width, s.layers, s.heads, s.intermediate, s.rope.theta, s.max_positions, s.window) for s in stacks
    ] == [
        (768, 14, 12, 2048, 10000.0, 8192, 512),
        (1024, 1, 16, 2730, 500000.0, 24576, 512),
        (2048, 25, 16, 5632, 500000.0, 4096, None),
        (1024, 9, 16, 2816, 500000.0, 24576, 512),
    ]
    assert {(s.kv_heads == s.heads, s.norm_eps, s.activation, s.rope.rope_type) for s in stacks} == {
        (True, 1e-5, "silu", "default")
    }
    assert (config.encoder_cross_all_layers, config.decoder_cross_all_layers) == (False, True)
    assert (config.token_projection, config.tie_word_embeddings) == (False, False)


@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling", None])
def test_part_of_a_head_is_not_rotated_by_stretched_types(place: str | None) -> None:
    linear = {"rope_type": "linear", "factor": 2.0}
    for share, fine in ((1.0, True), (None, True), (0.5, False), (0.0, False)):
        if place is None:
            part = {"rope_parameters": linear, "partial_rotary_factor": share}
        else:
            part = {place: {**linear, "partial_rotary_factor": share}}
        if fine:
            assert parse_config(raw(global_config=part)).global_stack.rope.factor == 2.0
        else:
            with pytest.raises(ConfigError, match="partial_rotary_factor"):
                parse_config(raw(global_config=part))


YARN = {
    "rope_type": "yarn",
    "rope_theta": 50.0,
    "factor": 2.5,
    "original_max_position_embeddings": 77,
    "attention_factor": 0.5,
    "beta_fast": 20.0,
    "beta_slow": 2.0,
    "mscale": -0.3,
    "mscale_all_dim": 0.4,
    "truncate": False,
}
LLAMA3 = {"rope_type": "llama3", "factor": 0.5, "low_freq_factor": 0.5, "high_freq_factor": 0.75}


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"rope_type": "default", "rope_theta": 1.5}, RopeConfig("default", 1.5)),
        ({"type": "linear", "factor": 0.5}, RopeConfig("linear", 9.0, 0.5)),
        ({"type": "yarn", "rope_type": "linear", "factor": 3}, RopeConfig("linear", 9.0, 3.0)),
        (
            {**LLAMA3, "original_max_position_embeddings": 33},
            RopeConfig("llama3", 9.0, 0.5, 33, low_freq_factor=0.5, high_freq_factor=0.75),
        ),
        (LLAMA3, RopeConfig("llama3", 9.0, 0.5, low_freq_factor=0.5, high_freq_factor=0.75)),
        (YARN, RopeConfig("yarn", 50.0, 2.5, 77, None, None, 0.5, 20.0, 2.0, -0.3, 0.4, False)),
        ({"rope_type": "yarn", "factor": None}, RopeConfig("yarn", 9.0)),
        ({"rope_type": "yarn", "factor": 0.25}, RopeConfig("yarn", 9.0, 0.25)),
    ],
)
def test_rope_parameters_arrive_where_they_belong(fields: dict[str, Any], wanted: RopeConfig) -> None:
    for place in ("rope_parameters", "rope_scaling"):
        config = parse_config(raw(global_config={place: fields, "rope_theta": 9.0}))
        assert config.global_stack.rope == wanted
    # What stands beside them wins over the original length inside, where a type has one.
    beside = {"rope_scaling": fields, "rope_theta": 9.0, "original_max_position_embeddings": 5}
    found = parse_config(raw(global_config=beside)).global_stack.rope
    assert found == replace(
        wanted, original_max_positions=5 if wanted.rope_type in ("llama3", "yarn") else None
    )


@pytest.mark.parametrize(
    ("fields", "name", "bad"),
    [
        ({"rope_type": "linear", "factor": 2.0}, "factor", [0.0, -1.0, None]),
        *((LLAMA3, name, [0.0, None]) for name in ("factor", "low_freq_factor")),
        (LLAMA3, "high_freq_factor", [0.5, 0.4, None]),
        *((YARN, name, [0.0]) for name in ("factor", "attention_factor", "beta_fast", "beta_slow")),
        (YARN, "truncate", [1]),
        (YARN, "original_max_position_embeddings", [0]),
        (YARN, "rope_theta", [1.0]),
    ],
)
def test_rope_parameters_out_of_range_are_refused(fields: dict[str, Any], name: str, bad: list[Any]) -> None:
    for value in bad:
        with pytest.raises(ConfigError, match=name):
            parse_config(raw(global_config={"rope_parameters": {**fields, name: value}}))
    with pytest.raises(ConfigError, match="factor: missing"):
        parse_config(raw(global_config={"rope_parameters": {"rope_type": fields["rope_type"]}}))


def test_small_rope_parameters_are_taken() -> None:
    for name in ("beta_fast", "beta_slow", "attention_factor", "factor"):
        config = parse_config(raw(global_config={"rope_parameters": {**YARN, name: 0.01}}))
        assert getattr(config.global_stack.rope, name) == 0.01
    assert parse_config(raw(global_config={"partial_rotary_factor": 0.5})) == parse_config(raw())
    for share in (0.0, -1.0):
        with pytest.raises(ConfigError, match="partial_rotary_factor"):
            parse_config(raw(global_config={"partial_rotary_factor": share}))


def test_hashes_and_patching_are_read() -> None:
    config = parse_config(
        raw(
            encoder_hash_byte_group_size=[2, 9],
            encoder_hash_byte_group_nb_functions=3,
            encoder_hash_byte_group_vocab=77,
        )
    )
    assert config.hash == HashSpec((2, 9), 3, 77)
    for fields, wanted in (
        ({"patching_threshold": 2}, PatchingRule("entropy", 2.0)),
        ({"patching_threshold_add": 0.5}, PatchingRule("entropy", 1.335442066192627, 0.5)),
        ({"patching_threshold_add": 0.0}, PatchingRule("entropy", 1.335442066192627)),
        (
            {"patching_threshold_add": 0.5, "monotonicity": True},
            PatchingRule("entropy", 1.335442066192627, monotonic=True),
        ),
        ({"max_patch_length": 7}, PatchingRule("entropy", 1.335442066192627, max_patch_length=7)),
        ({"patching_mode": "space", "monotonicity": True}, PatchingRule("space")),
        ({"patching_mode": "space", "patching_threshold_add": 0.5}, PatchingRule("space")),
        ({"patching_mode": "space", "max_patch_length": 7}, PatchingRule("space", max_patch_length=7)),
        ({"patching_mode": "space", "patch_size": None, "patching_threshold": None}, PatchingRule("space")),
        ({"patching_mode": "static"}, PatchingRule("static", patch_size=4)),
        ({"patching_mode": "static", "patch_size": 9}, PatchingRule("static", patch_size=9)),
        ({"patching_mode": "byte", "max_patch_length": 7}, PatchingRule("byte")),
        ({"patch_in_forward": False, "patch_size": None}, PatchingRule("byte")),
        ({"patch_in_forward": None}, PatchingRule("byte")),
    ):
        found = parse_config(raw(**fields))
        assert found.patching == wanted
        assert (found.patcher is None) == (wanted.mode != "entropy")
    with pytest.raises(ConfigError, match="patch_size"):
        parse_config(raw(patching_mode="static", patch_size=None))


def test_the_trained_context_is_the_shortest_part_s() -> None:
    for positions, wanted in (((900, 800, 700), 700), ((700, 900, 800), 700), ((9000, 8000, 7000), 4096)):
        parts = {
            name: {"max_position_embeddings": count}
            for name, count in zip(
                ("patcher_config", "encoder_config", "decoder_config"), positions, strict=True
            )
        }
        assert parse_config(raw(**parts)).trained_context == wanted
        assert parse_config(raw(**parts, trained_context=3)).trained_context == 3
    short = {"patcher_config": {"max_position_embeddings": 50}}
    assert parse_config(raw(**short)).trained_context == 50
    assert parse_config(raw(**short, patch_in_forward=False)).trained_context == 4096
    assert parse_config(raw(**short, patching_mode="space")).trained_context == 4096
