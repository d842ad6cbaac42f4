"""Inputs for a forward pass: what architectures of each kind take, and for real."""

import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import CONFIG_MAPPING

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import atlas as tool

from helpers import subjects
from helpers.errors import PlanError
from helpers.examples import BATCH, LENGTH, example_inputs
from helpers.small import small_config
from helpers.weightless import Weightless

pytestmark = pytest.mark.usefixtures("one_thread", "activated")

TAKES = {
    "qwen2": {"input_ids"},
    "bert": {"input_ids"},
    "m2m_100": {"input_ids", "decoder_input_ids"},
    "clip": {"input_ids", "pixel_values"},
    "vit": {"pixel_values"},
    "llava": {"input_ids", "pixel_values"},
    "qwen2_vl": {"input_ids", "pixel_values", "image_grid_thw", "mm_token_type_ids"},
    "wav2vec2": {"input_values"},
    "whisper": {"input_features", "decoder_input_ids"},
    "vjepa2": {"pixel_values_videos"},
}


def built(model_type, dtype="float32", attention="eager"):
    config = small_config(tool.default_config(model_type))
    return subjects.build(config, dtype, attention)


@pytest.mark.parametrize("model_type", TAKES)
def test_each_kind_gets_what_it_is_for(model_type):
    model = built(model_type, "bfloat16")
    inputs = example_inputs(model)
    assert set(inputs) == TAKES[model_type]
    assert {x.dtype for x in inputs.values()} <= {torch.long, torch.bfloat16}
    assert all(len(x) % BATCH == 0 for x in inputs.values())


@pytest.mark.parametrize("model_type", sorted(set(TAKES) - {"qwen2_vl"}))
def test_a_small_model_runs_on_them(model_type):
    model = built(model_type)
    with torch.no_grad():
        result = model(**example_inputs(model))
    assert all(
        x.isfinite().all() for x in result.values() if isinstance(x, torch.Tensor) and x.dim()
    )


def test_there_are_as_many_placeholders_as_features():
    model = built("llava")
    inputs = example_inputs(model)
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    places = inputs["input_ids"] == model.config.image_token_id
    assert places.sum() == sum(len(one) for one in features) > BATCH
    assert (~places).sum() == BATCH * LENGTH


def test_text_alone_brings_no_picture():
    assert set(example_inputs(built("llava"), text_alone=True)) == {"input_ids"}


def test_no_word_has_a_meaning_of_its_own():
    model = built("bert")
    model.config.pad_token_id = 2
    model.config.eos_token_id = 3
    assert set(example_inputs(model)["input_ids"].flatten().tolist()) == {4}


def test_they_have_data_where_the_model_has_none():
    with Weightless():
        model = built("vit", "float16", "flash_attention_2")
        inputs = example_inputs(model)
    assert isinstance(next(model.parameters()), FakeTensor)
    assert not isinstance(inputs["pixel_values"], FakeTensor)
    assert inputs["pixel_values"].dtype == torch.float16


def test_what_nobody_knows_is_one_sentence():
    class Strange(torch.nn.Linear):
        config = SimpleNamespace(is_encoder_decoder=False, model_type="strange")

        def forward(self, input_ids, moon_phase):
            raise AssertionError

    with pytest.raises(PlanError, match=r"^Strange wants moon_phase, .*give inputs=.*takes.$"):
        example_inputs(Strange(1, 1))


def test_small_keeps_the_architecture():
    large = CONFIG_MAPPING["qwen3_next"]()
    small = small_config(large)
    assert small.num_hidden_layers < large.num_hidden_layers
    assert set(small.layer_types) == set(large.layer_types)
    assert small.head_dim == large.head_dim
    assert large == CONFIG_MAPPING["qwen3_next"]()
    with torch.device("meta"), logging_off():
        sizes = [sum(p.numel() for p in subjects.model_class(c)(c).parameters())
                 for c in (small, large)]  # fmt: skip
    assert sizes[0] * 1000 < sizes[1]


class logging_off:
    def __enter__(self):
        logging.disable(logging.WARNING)

    def __exit__(self, *_):
        logging.disable(logging.NOTSET)
