"""A command of wtool in one of several processes on this machine, with the student sharded by FSDP.

accelerate shards on GPUs only, and takes several processes without any for plain copies; so it is told that there are
some. All else is its own way, as `accelerate launch` with a configuration for FSDP goes.

Called with a file to tell in, and the command.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_CPU": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}

from accelerate import DistributedType, PartialState  # noqa: E402

look = PartialState.__init__


def as_on_gpus(self: PartialState, *args: Any, **kwargs: Any) -> None:
    look(self, *args, **kwargs)
    self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = as_on_gpus

from distill.trainer import Distiller  # noqa: E402
from wtool.cli import run  # noqa: E402

judge = Distiller.held_out


def and_tell(self: Distiller, prefix: str = "eval") -> dict[str, float]:
    """Judge, and tell how much of the student this process holds meanwhile."""
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in self.model.parameters())
    if os.environ["RANK"] == "0":
        Path(sys.argv[1]).write_text(json.dumps({"sharded": self.is_fsdp_enabled, "held": held}))
    return judge(self, prefix)


Distiller.held_out = and_tell
os._exit(run(sys.argv[2:]))
