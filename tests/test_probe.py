"""The dtypes at the gate, against what the model was made of."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from helpers import backend, checkpoints
from helpers.backend import Backend
from helpers.probe import Dtypes, GateRecord, native_calls, watch
from helpers.reference_kernel import attention as reference

LAYERS = [f"model.layers.{i}.self_attn" for i in range(3)]
IDS = torch.tensor([[5, 6, 7, 8]])
BF16, FP16, FP32 = (Dtypes(*[name] * 3) for name in ("bfloat16", "float16", "float32"))

pytestmark = pytest.mark.usefixtures("one_thread", "activated")


def load(dtype=torch.bfloat16, attention="flash_attention_2"):
    folder = checkpoints.get("fp16")  # with grouped-query attention: k and v differ from q in shape
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)


def watched(model, error=None):
    """The records of one forward, which raises ``error`` or nothing. Without the cache, which would
    give v the dtype of k."""
    before = dict(ALL_ATTENTION_FUNCTIONS), list(reference.watchers)
    with torch.inference_mode(), watch(model) as records:
        if error is None:
            model(IDS, use_cache=False)
        else:
            with pytest.raises(RuntimeError, match=error):
                model(IDS, use_cache=False)
    assert (dict(ALL_ATTENTION_FUNCTIONS), reference.watchers) == before
    return records


def upcast(model, *projections):
    """Turn the output of some projections of every layer into float32, as a wrapper may do."""
    for layer in model.model.layers:
        for name in projections:
            projection = getattr(layer.self_attn, name)
            projection.register_forward_hook(lambda _module, _args, out: out.float())
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_arrives_as_it_is(dtype):
    stated = Dtypes.of(dtype, dtype, dtype)
    assert watched(load(dtype)) == [GateRecord(layer, stated, stated, True) for layer in LAYERS]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_without_flash_attention_nobody_asks(attention, dtype):
    records = watched(load(dtype, attention))
    assert records == [GateRecord(layer, Dtypes.of(dtype, dtype, dtype)) for layer in LAYERS]
    assert [record.accepted for record in records] == [None] * 3


def test_float32_is_refused_at_the_first_layer():
    records = watched(load(torch.float32), "FlashAttention only support fp16 and bf16 data type")
    assert records == [GateRecord(LAYERS[0], FP32, FP32, False)]
    assert records[0].accepted is False


def test_autocast_rescues_float32():
    with torch.autocast("cpu", dtype=torch.float16):
        records = watched(load(torch.float32))
    assert [record.kernel for record in records] == [FP16] * 3
    assert all(record.accepted for record in records)


def test_the_rescue_casts_float32_to_the_dtype_of_the_weights():
    model = upcast(load(), "q_proj", "k_proj", "v_proj")
    assert watched(model) == [GateRecord(layer, FP32, BF16, True) for layer in LAYERS]


def test_mixed_dtypes_are_told_apart_and_refused():
    mixed = Dtypes("bfloat16", "float32", "bfloat16")
    records = watched(upcast(load(), "k_proj"), "query and key must have the same dtype")
    assert records == [GateRecord(LAYERS[0], mixed, mixed, False)]
    assert records[0].accepted is False
    assert str(records[0].kernel) == "q bfloat16, k float32, v bfloat16"
    # float32 in q alone: the rescue casts all three.
    records = watched(upcast(load(), "q_proj"))
    assert records[0].attention_input == Dtypes("float32", "bfloat16", "bfloat16")
    assert records[0].kernel == BF16


def test_layers_have_their_names_under_peft():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(), LoraConfig(task_type="CAUSAL_LM", r=2))
    modules = dict(model.named_modules())
    records = watched(model)
    assert [modules[record.layer].layer_idx for record in records] == [0, 1, 2]
    assert {record.kernel for record in records} == {BF16}


def test_only_the_first_call_of_a_layer_is_kept():
    model = load()
    with torch.inference_mode(), watch(model) as records:
        model(IDS)
        upcast(model, "q_proj", "k_proj", "v_proj")
        with torch.autocast("cpu", dtype=torch.float16):
            model(IDS)
    assert records == [GateRecord(layer, BF16, BF16, True) for layer in LAYERS]


def test_watching_changes_no_logit():
    for attention in ("flash_attention_2", "sdpa", "eager"):
        model = load(attention=attention)
        with torch.inference_mode():
            plain = model(IDS).logits
            with watch(model):
                seen = model(IDS).logits
        assert torch.equal(plain, seen)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("attention", ["flash_attention_2", "sdpa", "eager"])
def test_registry_is_restored_after_an_error(attention, error):
    local = ALL_ATTENTION_FUNCTIONS._local_mapping
    local["their own"] = len
    before = dict(ALL_ATTENTION_FUNCTIONS), list(reference.watchers)
    try:
        with pytest.raises(error), watch(load(attention=attention)):  # noqa: PT012
            assert dict(ALL_ATTENTION_FUNCTIONS) != before[0]
            raise error
        assert (dict(ALL_ATTENTION_FUNCTIONS), reference.watchers) == before
        # In place: whoever holds the mapping sees the same.
        assert ALL_ATTENTION_FUNCTIONS._local_mapping is local
        assert local == {"their own": len}
    finally:
        local.clear()


@pytest.fixture(scope="module")
def native_operator():
    """An operator in flash-attn's namespace that checks nothing, for the CPU."""

    @torch.library.custom_op("flash_attn::dtype_guide_test", mutates_args=(), device_types="cpu")
    def operator(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        return q.clone()

    return operator


def test_native_operators_are_seen_and_nothing_else(native_operator):
    q = torch.zeros(1, 2, 2, 8, dtype=torch.float16)
    seen = []
    with native_calls(lambda _name, *qkv: seen.append(Dtypes.of(*qkv))), torch.inference_mode():
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
        assert seen == []
        out = native_operator(q, q.bfloat16(), q.float(), 1.0)
    native_operator(q, q, q, 1.0)
    assert seen == [Dtypes("float16", "bfloat16", "float32")]
    assert torch.equal(out, q)


def test_gate_over_native_operators(native_operator, monkeypatch):
    """As on a GPU: an attention function that casts, then calls an operator of flash-attn."""
    monkeypatch.setattr(backend, "detect", lambda: Backend("flash_attn", "cuda", "a test"))

    def attention(module, q, k, v, mask, **kwargs):
        out = native_operator(q.half(), k.half(), v.bfloat16(), 1.0)
        return out.transpose(1, 2).to(q.dtype), None

    local = ALL_ATTENTION_FUNCTIONS._local_mapping
    local["sdpa"] = attention
    try:
        records = watched(load(attention="sdpa"))
        assert local == {"sdpa": attention}
    finally:
        local.clear()
    at_kernel = Dtypes("float16", "float16", "bfloat16")
    # The operator took the mixed dtypes and came back: that is what is recorded, not a rule.
    assert records == [GateRecord(layer, BF16, at_kernel, True) for layer in LAYERS]


@given(*[st.sampled_from(["float16", "bfloat16", "float32", "float64"])] * 3)
def test_dtypes_of_one_kind_are_said_once(q, k, v):
    text = str(Dtypes(q, k, v))
    assert text == (q if q == k == v else f"q {q}, k {k}, v {v}")
