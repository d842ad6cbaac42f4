"""Record what ``from_pretrained`` loads under the installed Transformers.

Usage: python tools/record_loads.py

Run it once in an environment of each Transformers version; it adds its rows to
helpers/data/loads.json, which the notebooks show. The checkpoints must have been made before, in
the guide's own environment.
"""

import json
import logging
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

from helpers import checkpoints

FILE = Path(__file__).resolve().parents[1] / "helpers" / "data" / "loads.json"
LOADS = {
    "omitted": ({}, torch.float32),
    '"auto"': ({"dtype": "auto"}, torch.float32),
    "omitted, set_default_dtype(bfloat16)": ({}, torch.bfloat16),
}


def main() -> None:
    """Load every checkpoint in every way and store the dtypes of the parameters."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    records = json.loads(FILE.read_text("utf-8")) if FILE.is_file() else []
    records = [r for r in records if r["transformers"] != transformers.__version__]
    for name in checkpoints.available():
        for load, (arguments, default) in LOADS.items():
            torch.set_default_dtype(default)
            model = AutoModelForCausalLM.from_pretrained(checkpoints.get(name), **arguments)
            records.append(
                {
                    "transformers": transformers.__version__,
                    "torch": torch.__version__.partition("+")[0],
                    "checkpoint": name,
                    "dtype": load,
                    "loaded": sorted({str(p.dtype)[6:] for p in model.parameters()}),
                }
            )
    FILE.write_text(json.dumps(records, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
