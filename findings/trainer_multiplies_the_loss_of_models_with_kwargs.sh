#!/usr/bin/env bash
# transformers' Trainer: evaluate() of a model of one's own on N processes (or devices) reports N times its loss,
# if its forward takes **kwargs and returns a plain mean, as many models with code of their own do. Trainer takes
# **kwargs as a promise that the loss is divided by the num_items_in_batch which it passes, of all processes,
# and multiplies by their number, in evaluation as in training; on one process nothing is to be seen. A model
# without **kwargs, or whose class says `accepts_loss_kwargs = False`, is reported as it is.
#
# transformers 5.23.0, accelerate 1.15.0, torch 2.13.0
# Seen: 2 processes: forward(input_ids, labels): eval_loss 3.0; and **kwargs: eval_loss 6.0
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
cd "$here"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cat > look.py <<'PYTHON'
import torch
from transformers import Trainer, TrainingArguments


class Strict(torch.nn.Module):
    """Its loss is 3, a mean over tokens, whatever it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, input_ids, labels=None):
        return {"loss": self.weight.mean(), "logits": torch.zeros(*input_ids.shape, 1)}


class WithKwargs(Strict):
    def forward(self, input_ids, labels=None, **kwargs):
        return super().forward(input_ids)


rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 8
losses = []
for model in (Strict(), WithKwargs()):
    arguments = TrainingArguments("out", use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = Trainer(model, arguments, eval_dataset=rows)
    losses.append(trainer.evaluate()["eval_loss"])
if trainer.args.process_index == 0:
    print(
        f"Seen: {trainer.args.world_size} processes: forward(input_ids, labels): eval_loss "
        f"{losses[0]:.1f}; and **kwargs: eval_loss {losses[1]:.1f}"
    )
PYTHON
seen="$(venv/bin/torchrun --nproc_per_node 2 look.py 2> errors | grep Seen)" || { tail -5 errors; exit 1; }
echo "$seen"
[ "$seen" = "Seen: 2 processes: forward(input_ids, labels): eval_loss 3.0; and **kwargs: eval_loss 6.0" ]
