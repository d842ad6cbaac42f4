"""What can be done to a loaded model before it runs: each step as a function and as the lines that
a person types."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from helpers import adapter, checkpoints, training


class Context(NamedTuple):
    """What a step may need besides the model: its tokenizer, and how its attention was chosen."""

    tokenizer: Any
    attention: str


@dataclass(frozen=True)
class Step:
    """A change to a loaded model: the function that makes it, the lines that a person types, and
    what it is in a few words."""

    apply: Callable[[Any, Context], Any]
    lines: tuple[str, ...]
    what: str = ""


def _add_lora(model: Any, _: Context) -> Any:
    from peft import get_peft_model

    return get_peft_model(model, _adapter_for(model))


def _add_dora(model: Any, _: Context) -> Any:
    from peft import get_peft_model

    return get_peft_model(model, _adapter_for(model, use_dora=True))


def _adapter_for(model: Any, **options: Any) -> Any:
    """A LoRA of rank 4 where peft puts one by default; on a model type that it has no default for,
    where it would on Llama, and without such names on every Linear.

    The default is spelt out, because peft 0.21.2 finds none for Mixtral once it has translated the
    names of its experts.
    """
    from peft import LoraConfig
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS
    from torch.nn import Linear

    linear = (name for name, module in model.named_modules() if isinstance(module, Linear))
    ends = {name.rpartition(".")[2] for name in linear}
    usual = ["q_proj", "v_proj"]
    targets: Any = usual if {*usual} <= ends else "all-linear"
    targets = DEFAULTS.get(model.config.model_type) or targets
    task = "CAUSAL_LM" if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) else None
    return LoraConfig(task_type=task, target_modules=targets, r=4, **options)


def _merge(model: Any, _: Context) -> Any:
    adapter.refuse_merge(model)
    return model.merge_and_unload()


def _reload(model: Any, context: Context) -> Any:
    from transformers import AutoModelForCausalLM

    folder = checkpoints.scratch()
    training.save(model, folder)
    again: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", attn_implementation=context.attention
    )
    return again.to(model.device)


def _prepare_kbit(model: Any, _: Context) -> Any:
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(model)


def _norms_float(model: Any, _: Context) -> Any:
    for name, module in model.named_modules():
        # GPT-2's are called ln_1.
        if "norm" in name or type(module).__name__.endswith("Norm"):
            module.float()
    return model


def _train(model: Any, context: Context) -> Any:
    training.train(model, context.tokenizer, mixed_precision="bfloat16", steps=1)
    return model


STEPS = {
    "float": Step(
        lambda model, _: model.float(), ("model = model.float()",), "cast the model to float32"
    ),
    "half": Step(lambda model, _: model.half(), ("model = model.half()",), "cast it to float16"),
    "bfloat16": Step(
        lambda model, _: model.bfloat16(), ("model = model.bfloat16()",), "cast it to bfloat16"
    ),
    "lora": Step(
        _add_lora,
        (
            "from peft import LoraConfig, get_peft_model",
            'model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4))',
        ),
        "add a LoRA adapter",
    ),
    "dora": Step(
        _add_dora,
        (
            "from peft import LoraConfig, get_peft_model",
            'model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, use_dora=True))',
        ),
        "add a DoRA adapter",
    ),
    "train": Step(
        _train,
        (
            "from transformers import Trainer, TrainingArguments",
            'ids = tokenizer("a sentence to learn")["input_ids"]',
            'data = [{"input_ids": ids, "labels": ids}]',
            'arguments = TrainingArguments("trained", bf16=True, max_steps=1, report_to=[],'
            ' use_cpu=model.device.type == "cpu")',
            "Trainer(model, arguments, train_dataset=data).train()",
        ),
        "train one step with the Trainer and bf16=True",
    ),
    "merge": Step(
        _merge, ("model = model.merge_and_unload()",), "merge the adapter into the weights"
    ),
    "reload": Step(
        _reload,
        (
            'model.save_pretrained("merged")',
            'model = AutoModelForCausalLM.from_pretrained("merged", {dtype}="auto",'
            ' attn_implementation="{attention}").to(model.device)',
        ),
        'save the model and load it with dtype="auto"',
    ),
    "norms_float": Step(
        _norms_float,
        (
            "for name, module in model.named_modules():",
            '    if "norm" in name or type(module).__name__.endswith("Norm"):',
            "        module.float()",
        ),
        "cast every norm to float32",
    ),
    "prepare_kbit": Step(
        _prepare_kbit,
        (
            "from peft import prepare_model_for_kbit_training",
            "model = prepare_model_for_kbit_training(model)",
        ),
        "prepare_model_for_kbit_training, without quantization",
    ),
}
ADD_ADAPTER = ("lora", "dora")
NEED_WEIGHTS = ("train", "merge", "reload")
