"""The X-ray: what it says of models, against the same models without it."""

import copy
import json
import shutil
import threading

import huggingface_hub
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.module_tracker import ModuleTracker
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    PhiConfig,
    Qwen2Config,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from helpers import checkpoints, subjects
from helpers.errors import PlanError
from helpers.gate import xray
from helpers.reference_kernel import attention as reference

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
REFUSED = "FlashAttention only support fp16 and bf16 data type"
MIXED = "mat1 and mat2 must have the same dtype, but got Float and BFloat16"
FIRST = "model.layers.0.self_attn"

pytestmark = pytest.mark.usefixtures("one_thread", "activated")


def load(dtype=torch.bfloat16):
    folder = checkpoints.get("bf16")
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="flash_attention_2"
    )


class UpcastingNorm(torch.nn.Module):
    """A q norm of one's own, without the cast back."""

    def __init__(self, inside, size):
        super().__init__()
        self.inside = inside
        self.weight = torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16))

    def forward(self, x):
        x = self.inside(x).float()
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def with_norms_in_float32():
    model = load()
    for name, module in model.named_modules():
        if "norm" in name:
            module.float()
    return model


def with_a_norm_on(*projections):
    model = load()
    for layer in model.model.layers:
        for name in projections:
            inside = getattr(layer.self_attn, name)
            setattr(layer.self_attn, name, UpcastingNorm(inside, inside.out_features))
    return model


def with_lora(model):
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4))


def embeddings():
    return {"inputs_embeds": torch.rand(2, 4, 128)}


# Model, inputs, what it raises, and where the float32 came in: module, kind, and name or function.
CASES = {
    "float32 weights": (
        lambda: load(torch.float32), None, REFUSED,
        ("model.embed_tokens", "parameter", "model.embed_tokens.weight"),
    ),
    "LoRA on a float32 base": (
        lambda: with_lora(load(torch.float32)), None, REFUSED,
        (
            "base_model.model.model.embed_tokens", "parameter",
            "base_model.model.model.embed_tokens.weight",
        ),
    ),
    "float32 norms": (
        with_norms_in_float32, None, MIXED,
        ("model.layers.0.input_layernorm", "parameter", "model.layers.0.input_layernorm.weight"),
    ),
    "k-bit preparation without quantization": (
        lambda: prepare_model_for_kbit_training(load()), None, REFUSED,
        ("model.embed_tokens", "parameter", "model.embed_tokens.weight"),
    ),
    "float32 inputs_embeds": (
        load, embeddings(), MIXED,
        ("model.layers.0.input_layernorm", "input", "inputs_embeds"),
    ),
    "q norm that upcasts": (
        lambda: with_a_norm_on("q_proj"), None, None,
        ("model.layers.0.self_attn.q_proj", "cast", None),
    ),
    "k norm that upcasts": (
        lambda: with_a_norm_on("k_proj"), None, "query and key must have the same dtype",
        ("model.layers.0.self_attn.k_proj", "cast", None),
    ),
    "bfloat16": (load, None, None, None),
    "LoRA on a bfloat16 base": (lambda: with_lora(load()), None, None, None),
}  # fmt: skip


def raised_by(model, inputs):
    """What the forward raises without anybody who watches."""
    try:
        with torch.no_grad():
            model(**(inputs or {"input_ids": IDS}), use_cache=False)
    except Exception as error:
        return type(error).__name__, str(error)
    return None, None


@pytest.mark.parametrize("size", [None, "full"])
@pytest.mark.parametrize("name", CASES)
def test_it_names_what_stops_a_model_and_where_float32_came_in(name, size):
    make, inputs, error, origin = CASES[name]
    model = make()
    found = xray(model, inputs, size=size)
    truth = raised_by(model, inputs)
    assert (found.error_type, found.error) == truth == (error and "RuntimeError", error)
    assert found.ok is (error is None)
    assert found.weightless is (size == "full")
    first = found.first_float32
    assert (first and (first.module, first.kind, first.name)) == origin
    if origin and not origin[2]:
        assert first.line.endswith("x = self.inside(x).float()")
        assert "test_gate.py" in first.line
    if error:
        assert error in found.verdict
        assert ".py:" in found.at


def test_a_config_a_folder_and_a_live_model_say_the_same():
    live = xray(load(torch.float32))
    config = AutoConfig.from_pretrained(checkpoints.get("bf16"))
    for other in (
        xray(config, dtype="float32"),
        xray(checkpoints.get("bf16"), dtype=torch.float32),
        xray("bf16", dtype="float32"),
        xray("fp32"),
    ):
        assert (other.ok, other.error, other.at) == (live.ok, live.error, live.at)
        assert other.layers == live.layers
        assert other.first_float32 == live.first_float32
        assert other.weightless


def test_the_rescue_is_shown_with_its_reason():
    found = xray(with_a_norm_on("q_proj"))
    for layer in found.layers:
        assert (layer.q, layer.k, layer.v) == ("float32", "bfloat16", "bfloat16")
        assert (layer.after_rescue, layer.accepted) == ("bfloat16", True)
        assert layer.rescue == "the first Linear is q_proj.inside, with a bfloat16 weight"
    under = xray(load(torch.float32), autocast="float16")
    assert under.layers[0].rescue == "autocast is on, to float16"
    assert under.layers[0].after_rescue == "float16"
    # Under autocast q is float16 after its projection; the rotary tables make it float32 again.
    assert under.first_float32.module == "model.rotary_emb"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert xray(load(torch.float32)).layers[0].after_rescue == "bfloat16"


def test_the_stations_of_a_layer():
    found = xray(with_a_norm_on("q_proj", "k_proj"), cache="dynamic")
    assert [(s.name, s.dtype) for s in found.layers[0].stations] == [
        ("embedding", "bfloat16"),
        ("norm", "bfloat16"),
        ("projection", "bfloat16"),
        ("q/k norm", "float32"),
        ("rotary", "float32"),
        ("cache", "float32"),  # a cache has one dtype, the one of the first keys: v becomes float32
        ("attention input", "float32"),
        ("gate", "bfloat16"),
    ]
    assert [layer.name for layer in found.layers] == [
        f"model.layers.{i}.self_attn" for i in (0, 1, 2)
    ]


def test_harmless_float32_is_told_apart():
    found = xray(load())
    seen = {(one.what, one.modules, one.times) for one in found.harmless}
    assert ("norm", "model.layers.0-2.input_layernorm", 3) in seen
    assert {what for what, _, _ in seen} == {"norm", "rotary tables"}
    lora = xray(with_lora(load()))
    assert "LoRA" in {one.what for one in lora.harmless}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("what", [load, lambda: "bf16"], ids=["live", "config"])
def test_caches_and_decoding(what, cache, decode):
    found = xray(what(), cache=cache, decode=decode)
    assert found.ok
    assert "cache: bfloat16" in map(str, found.layers[0].stations)
    lengths = {o.inputs for o in found.operations if o.name == "aten.embedding.default"}
    assert lengths == {("bfloat16", "int64")}


def test_padding_inputs_embeds_and_batches_of_one():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    for inputs in (
        {"input_ids": IDS, "attention_mask": mask},
        {"inputs_embeds": torch.rand(2, 4, 128, dtype=torch.bfloat16)},
        IDS[:1],
    ):
        for size in (None, "full"):
            found = xray(load(), inputs, size=size)
            assert found.ok, found
            assert [layer.after_rescue for layer in found.layers] == ["bfloat16"] * 3


class Count(TorchDispatchMode):
    """PyTorch's own way to see operations and modules."""

    def __init__(self):
        super().__init__()
        self.tracker = ModuleTracker()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        deepest = max(self.tracker.parents, key=lambda path: path.count("."))
        self.seen.append((deepest.partition(".")[2], str(func)))
        return result


def test_every_operation_is_recorded_with_its_module():
    model = load()
    count = Count()
    with torch.no_grad(), count.tracker, count:
        model(input_ids=IDS, use_cache=False)
    found = xray(model, IDS)
    seen = [(o.module, o.name) for o in found.operations]
    assert [name for _, name in seen] == [name for _, name in count.seen]
    # The tracker calls the model itself by its class.
    assert [path for path, _ in seen] == [
        path if path != "Global" else "" for path, _ in count.seen
    ]


def state_of(model):
    return {
        "mode": [m.training for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "attention": model.config._attn_implementation,
        "registry": (dict(ALL_ATTENTION_FUNCTIONS), dict(AttentionInterface._global_mapping)),
        "watchers": list(reference.watchers),
        "modes": torch.utils._python_dispatch._get_current_dispatch_mode_stack(),
    }


def tensors_of(model):
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {**model.state_dict(), **gradients, "random": torch.get_rng_state()}


class Norm(torch.nn.Module):
    """Batch norm: a forward in training mode changes its buffers."""

    def __init__(self, inside, size):
        super().__init__()
        self.inside, self.batch = inside, torch.nn.BatchNorm1d(size, dtype=torch.bfloat16)

    def forward(self, x):
        return self.batch(self.inside(x).transpose(1, 2)).transpose(1, 2)


def in_training():
    model = load().train()
    model.model.norm = Norm(model.model.norm, 128)
    model.config.attention_dropout = 0.5
    model(input_ids=IDS, labels=IDS).loss.backward()
    return model


def fail(_module, _args):
    raise ValueError("inside")


def interrupt(_module, _args):
    raise KeyboardInterrupt


@pytest.mark.parametrize("size", [None, "full"])
@pytest.mark.parametrize("hook", [None, fail, interrupt])
def test_a_model_in_training_is_left_as_it_was(hook, size):
    model = in_training()
    model.gradient_checkpointing_enable()
    if hook is not None:
        model.model.layers[1].mlp.register_forward_pre_hook(hook)
    model.model.layers[0].register_forward_hook(lambda *_: None)
    before, tensors = state_of(model), copy.deepcopy(tensors_of(model))
    if hook is interrupt:
        with pytest.raises(KeyboardInterrupt):
            xray(model, IDS, size=size)
    else:
        found = xray(model, IDS, size=size)
        assert found.ok is (hook is None)
        assert found.error == (hook and "inside")
    assert state_of(model) == before
    for name, tensor in tensors_of(model).items():
        assert torch.equal(tensor, tensors[name]), name
    assert model(input_ids=IDS[:, :2]).logits is not None if hook is None else True


def test_two_threads_do_not_see_each_other():
    models = {"bf16": load(), "fp32": load(torch.float32)}
    found, plain = {name: [] for name in models}, []
    start = threading.Barrier(3)

    def look(name):
        start.wait()
        for _ in range(4):
            found[name].append(xray(models[name], IDS))

    def run():
        start.wait()
        for _ in range(8):
            with torch.no_grad():
                plain.append(models["bf16"](input_ids=IDS, use_cache=False).logits)

    threads = [threading.Thread(target=look, args=(name,)) for name in models]
    threads.append(threading.Thread(target=run))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = {name: xray(model, IDS) for name, model in models.items()}
    for name, several in found.items():
        assert len(several) == 4
        for one in several:
            assert one.layers == alone[name].layers
            assert len(one.operations) == len(alone[name].operations)
            assert one.first_float32 == alone[name].first_float32
    assert len(plain) == 8


class OwnKernel(torch.nn.Module):
    """Attention as remote code may do it: past the interface, straight into the kernel."""

    def __init__(self, kernel):
        super().__init__()
        self.qkv, self.kernel = torch.nn.Linear(8, 24, dtype=torch.bfloat16), kernel

    def forward(self, x, upcast=False):
        q, k, v = self.qkv(x).unflatten(-1, (3, 1, 8)).unbind(2)
        return self.kernel(q.float() if upcast else q, k, v)


def test_a_kernel_that_is_called_past_the_interface_is_watched():
    model = OwnKernel(reference.flash_attn_func)
    inputs = {"x": torch.rand(2, 4, 8, dtype=torch.bfloat16)}
    found = xray(model, inputs)
    assert [layer.name for layer in found.layers] == ["flash_attn_func 0"]
    assert found.layers[0].after_rescue == "bfloat16"
    refused = xray(model, {**inputs, "upcast": True})
    assert (refused.ok, refused.error) == (False, REFUSED)
    assert refused.first_float32.kind == "cast"


def test_a_model_without_an_attention_interface_is_called_so():
    model = OwnKernel(lambda q, k, v: q + k + v)
    found = xray(model, {"x": torch.rand(2, 4, 8, dtype=torch.bfloat16)})
    assert found.ok
    assert "no attention call was seen" in found.verdict
    assert "no attention interface" in found.verdict


class Twice(torch.nn.Module):
    """A layer that is used twice, with another dtype the second time."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids):
        first = self.model(inputs_embeds=self.model.get_input_embeddings()(input_ids))
        return first, self.model(inputs_embeds=torch.rand(2, 4, 128))


def test_every_attention_call_is_shown_also_of_a_layer_that_is_used_again():
    found = xray(Twice(load()), autocast="bfloat16", inputs=IDS)
    assert len(found.layers) == 6
    assert [layer.name for layer in found.layers[:3]] == [layer.name for layer in found.layers[3:]]
    assert found.layers[0].q == "bfloat16"
    assert found.layers[3].q == "float32"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    folder = shutil.copytree(checkpoints.get("bf16"), tmp_path_factory.mktemp("q") / "bitnet")
    file = folder / "config.json"
    method = {"quant_method": "bitnet", "linear_class": "bitlinear", "quantization_mode": "offline"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": method}))
    return folder


def test_a_quantized_model(quantized):
    model = AutoModelForCausalLM.from_pretrained(
        quantized, dtype=torch.bfloat16, attn_implementation="flash_attention_2"
    )
    assert type(model.hf_quantizer).__name__ == "BitNetHfQuantizer"
    for module in model.modules():
        if type(module).__name__ == "BitLinear":  # four weights of two bits a byte
            module.weight = module.weight[: len(module.weight) // 4]
    assert xray(model, IDS).ok
    wide = {"inputs_embeds": torch.rand(2, 4, 128)}
    found = xray(model, wide)
    assert (found.error_type, found.error) == raised_by(model, wide)
    assert found.layers[0].rescue == "the model is quantized, from bfloat16"
    assert (found.layers[0].q, found.layers[0].after_rescue) == ("float32", "bfloat16")
    assert str(found.layers[0].stations[0]) == "inputs_embeds: float32"
    assert found.first_float32.name == "inputs_embeds"
    by_config = xray(quantized)
    assert "quantization (bitnet)" in by_config.notes[0]


def test_a_hub_id_from_the_cache(tmp_path, monkeypatch):
    """As the hub's cache holds a model of which only the config was downloaded."""
    snapshot = tmp_path / "models--org--model" / "snapshots" / ("0" * 40)
    (tmp_path / "models--org--model" / "refs").mkdir(parents=True)
    (tmp_path / "models--org--model" / "refs" / "main").write_text("0" * 40)
    snapshot.mkdir(parents=True)
    shutil.copy(checkpoints.get("fp32") / "config.json", snapshot)
    for constants in (huggingface_hub.constants, huggingface_hub.file_download):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr(transformers.utils.hub, "HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    found = xray("org/model")
    assert (found.ok, found.error) == (False, REFUSED)
    assert found.subject.startswith("org/model (")


class DependsOnData(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = torch.nn.Linear(8, 8)

    def forward(self, x):
        return x if self.inside(x).sum().item() > 0 else -x


def test_a_forward_that_reads_numbers_cannot_be_told_without_them():
    inputs = {"x": torch.rand(2, 8)}
    assert xray(DependsOnData(), inputs).ok
    found = xray(DependsOnData(), inputs, size="full")
    assert found.ok is None
    assert "aten._local_scalar_dense" in found.verdict
    assert "could not tell" in found.verdict


@pytest.mark.parametrize(
    ("what", "options", "parts"),
    [
        ("Qwen9-1T", {}, ["'Qwen9-1T' is not a checkpoint", "Qwen1.5-72B", "hub id"]),
        ("bf16", {"dtype": "int8"}, ["dtype='int8'", "'bfloat16'"]),
        ("bf16", {"attention": "flash"}, ["attention='flash'", "'flash_attention_2'"]),
        ("bf16", {"autocast": "float32"}, ["autocast='float32'", "'float16'"]),
        ("bf16", {"size": "half"}, ["size='half'", "'full'"]),
        ("bf16", {"cache": "paged"}, ["cache='paged'", "'static'"]),
        ("bf16", {"after_load": "fly"}, ["'fly'", "'norms_float'"]),
        ("bf16", {"after_load": ["train"]}, ["'train'", "weights"]),
        (42, {}, ["42", "expected"]),
        ("bf16", {"inputs": "a text"}, ["'a text'", "token ids"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(what, options, parts):
    with pytest.raises(PlanError) as caught:
        xray(what, **options)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    for part in parts:
        assert part in sentence


def test_a_live_model_has_its_dtypes_already():
    for options in ({"dtype": "float32"}, {"after_load": "lora"}, {"attention": "sdpa"}):
        with pytest.raises(PlanError, match="A live model has its dtypes"):
            xray(load(), **options)


def test_code_of_a_checkpoint_needs_leave(tmp_path):
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(PlanError, match="trust_remote_code=True"):
        xray(tmp_path)
    known = Qwen2Config(auto_map={"AutoModelForCausalLM": "own.Model"})
    with pytest.raises(PlanError, match="trust_remote_code=True"):
        xray(known)


def test_what_only_the_cpu_computes_is_said():
    """Phi has PyTorch's own layer norm, Gemma one of its own that casts back."""
    norms = {"dtype": "bfloat16", "after_load": "norms_float"}
    phi = xray(PhiConfig(num_hidden_layers=2), **norms)
    assert phi.ok
    assert any("on CUDA (https://github.com/pytorch/pytorch/issues/138128" in n for n in phi.notes)
    assert "input_layernorm" in phi.notes[0]
    for quiet in (
        xray(PhiConfig(num_hidden_layers=2), dtype="bfloat16"),
        xray(PhiConfig(num_hidden_layers=2), dtype="float32", autocast="bfloat16"),
        xray(GemmaConfig(num_hidden_layers=2), **norms),
    ):
        assert quiet.ok
        assert quiet.notes == ()


def test_what_the_reference_kernel_lacks_is_no_refusal():
    """Gemma 2 caps its scores, which the reference kernel does not compute."""
    found = xray(Gemma2Config(num_hidden_layers=2), dtype="bfloat16")
    assert (found.ok, found.error_type) == (None, "NotImplementedError")
    assert "softcap" in found.verdict
    assert [layer.accepted for layer in found.layers] == [None]
    assert "⚠ not told" in repr(found)
    refused = xray(Gemma2Config(num_hidden_layers=2), dtype="float32")
    assert (refused.ok, refused.error) == (False, REFUSED)


class Constant(torch.nn.Module):
    """Makes a float32 that is gone again, and then one that no operation makes."""

    def __init__(self):
        super().__init__()
        self.inside = torch.nn.Linear(8, 8, dtype=torch.bfloat16)

    def forward(self, x):
        x = self.inside(x)
        for _ in range(50):
            x.float()
            torch.tensor([1.0])
        return x


def test_a_new_tensor_in_the_place_of_an_old_one_is_new():
    found = xray(Constant(), {"x": torch.rand(2, 8, dtype=torch.bfloat16)})
    made = [one for one in found.harmless if "torch.tensor([1.0])" in one.line]
    assert sum(one.times for one in made) == 50


def test_every_shipped_config_has_its_source_and_its_size():
    data = json.loads(subjects.QWEN.read_text("utf-8"))["models"]
    assert {"Qwen1.5-0.5B", "Qwen1.5-72B", "Qwen1.5-110B", "Qwen2-7B"} <= data.keys()
    for name in ("Qwen1.5-0.5B", "Qwen2-7B", "Qwen1.5-72B"):
        found = xray(name)
        assert found.ok
        assert set(found.parameters) == {"bfloat16"}
    for name, entry in data.items():
        assert entry["source"].startswith("https://"), name
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**entry["config"]))
        assert sum(p.numel() for p in model.parameters()) == entry["parameters"], name


def test_json_is_for_programs():
    found = xray("bf16", dtype="float32")
    data = json.loads(found.to_json())
    assert data["ok"] is False
    assert data["first_float32"]["name"] == "model.embed_tokens.weight"
    assert data["layers"][0]["name"] == FIRST
    assert data["layers"][0]["stations"][0] == {"name": "embedding", "dtype": "float32"}
    assert data["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert data["backend"] == "reference"


class Changed(torch.nn.Module):
    """A norm of the model whose output a function changes."""

    def __init__(self, inner, change):
        super().__init__()
        self.inner = inner
        self.change = change

    def forward(self, x):
        return self.change(self.inner, x)


def with_change(change):
    model = load()
    layer = model.model.layers[1]
    layer.input_layernorm = Changed(layer.input_layernorm, change)
    return model


CHANGED = "model.layers.1.input_layernorm"


def caught(inner, x):
    try:
        inner(x[..., :3])
    except RuntimeError:
        return x.float()
    raise AssertionError("the norm took a tensor of another width")


@pytest.mark.parametrize("size", [None, "full"])
@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (caught, "cast"),
        (lambda inner, x: inner(x) * torch.tensor([1.5] * x.shape[-1]), "created"),
        (lambda inner, x: inner(x) * torch.full((x.shape[-1],), 1.5), "created"),
    ],
)
def test_float32_made_in_the_middle_of_a_forward_is_found_there(change, kind, size):
    model = with_change(change)
    found = xray(model, IDS, size=size)
    assert (found.error_type, found.error) == raised_by(model, {"input_ids": IDS})
    assert found.first_float32.module == CHANGED
    assert found.first_float32.kind == kind


def masked(inner, x):
    result = torch.zeros_like(x)
    result[inner(x)[..., 0] > -9e9] = inner(x).float().reshape(-1, x.shape[-1])
    return result


def convolved(inner, x):
    weight = torch.ones(1, 1, 1)
    torch.nn.functional.conv1d(x[:, :1, :].float(), weight, torch.ones(1, dtype=x.dtype))
    return inner(x)


@pytest.mark.parametrize("change", [masked, convolved])
@pytest.mark.parametrize("size", [None, "full"])
def test_dtypes_that_are_refused_elsewhere_than_in_a_matmul(change, size):
    model = with_change(change)
    found = xray(model, size=size)
    assert found.ok is False
    assert (found.error_type, found.error) == raised_by(model, {"input_ids": IDS})


def test_what_the_cpu_lacks_beside_attention_is_a_failure():
    model = with_change(lambda inner, x: inner(x) * torch.linalg.det(x[0, :2, :2]))
    found = xray(model, IDS)
    assert (found.error_type, found.error) == raised_by(model, {"input_ids": IDS})
    assert found.error_type in ("NotImplementedError", "RuntimeError")
    assert (found.ok, found.layers[0].accepted) == (False, True)


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_prompt_that_fails_is_shown_where_a_token_was_asked_for(cache):
    found = xray(load(torch.float32), IDS, decode=True, cache=cache)
    assert (found.ok, found.error) == (False, REFUSED)
    assert found.first_float32.module == "model.embed_tokens"
    assert any("prompt" in note for note in found.notes)


def test_a_config_that_cannot_be_built_is_refused_in_a_sentence():
    config = transformers.FalconConfig(num_hidden_layers=1)
    with pytest.raises(PlanError, match=r"^FalconConfig cannot be built .*: give another config"):
        xray(config, dtype="bfloat16")


def test_a_module_without_a_config_needs_inputs():
    with pytest.raises(PlanError, match=r"^Linear has no config .*: give inputs="):
        xray(torch.nn.Linear(3, 3))
    assert xray(torch.nn.Linear(3, 3), {"input": torch.ones(2, 3)}).ok


class Counts(torch.nn.Module):
    """Buffers that change, also in eval mode, one of them by taking the place of the old one."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls = torch.zeros(len(self.calls) + 1)
        return self.norm(x)


@pytest.mark.parametrize("size", [None, "full"])
def test_buffers_are_left_as_they_were_in_eval_mode_too(size):
    model = Counts().eval()
    model.norm.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    held = dict(model.named_buffers())
    xray(model, {"x": torch.randn(3, 4)}, size=size)
    assert all(buffer is held[name] for name, buffer in model.named_buffers())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_what_a_typing_error_in_the_inputs_raises_is_the_same_for_a_config():
    wrong = {"inptu_ids": IDS}
    assert xray(load(), wrong).ok is False
    assert xray(Qwen2Config(num_hidden_layers=1), wrong, dtype="bfloat16").ok is False


def with_a_shared_float32():
    """One float32 tensor in two norms; the first casts back, the second does not."""
    model = load()
    shared = torch.nn.Parameter(torch.ones(model.config.hidden_size))
    for layer, casts in zip(model.model.layers, (True, False), strict=False):
        layer.input_layernorm = Shares(layer.input_layernorm, shared, casts)
    return model


class Shares(torch.nn.Module):
    def __init__(self, inner, shared, casts):
        super().__init__()
        self.inner, self.shared, self.casts = inner, shared, casts

    def forward(self, x):
        result = self.inner(x) * self.shared
        return result.to(x.dtype) if self.casts else result


def with_parameters_in_one_storage():
    model = load()
    norm = model.model.layers[1].input_layernorm
    other = model.model.layers[1].post_attention_layernorm
    flat = torch.ones(2 * norm.weight.numel())
    first, second = flat.chunk(2)
    other.weight, norm.weight = torch.nn.Parameter(first), torch.nn.Parameter(second)
    return model


@pytest.mark.parametrize("size", [None, "full"])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (with_a_shared_float32, "model.layers.0.input_layernorm.shared"),
        (with_parameters_in_one_storage, f"{CHANGED}.weight"),
    ],
)
def test_a_float32_parameter_is_named_where_its_use_matters(make, name, size):
    found = xray(make(), IDS, size=size)
    assert found.error == MIXED
    assert (found.first_float32.module, found.first_float32.name) == (CHANGED, name)
