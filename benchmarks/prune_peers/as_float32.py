"""A checkpoint in float32, so that two tools that compare weights neither round nor compute in another type.

python as_float32.py MODEL OUT
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).save_pretrained(sys.argv[2])
AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
