"""Trained scorers beside C_b, as rows that train_scorer.py and evaluate.py know, too.

    python -m paper.scorers train_scorer --run runs/digits --scorer compare
    python -m paper.scorers evaluate --run runs/digits --scorers cb compare energy
    python -m paper.limits --run runs/digits --scorer compare    # and its control, the class mean

compare must compare: it sees no label, and one net for x and x'. unlabeled is C_b without y. A
scorer of your own needs the same: a class with settings, and a row.
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn

import evaluate
import train_scorer
from moodcat import SCORERS, BinaryScorer, DownBlock, Trained
from train_gen import run_script

class Comparer(nn.Module):
    """An affine function of the distance between features of x and of x' (B, channels, S, S), by the
    blocks of C_b -> (B,), higher = in-distribution. y (B,) plays no part but through x'."""
    def __init__(self, num_classes, ch=32, channels=3):
        super().__init__()
        self.settings = dict(num_classes=num_classes, ch=ch, channels=channels)
        self.blocks = nn.Sequential(
            DownBlock(channels, 2 * ch, first=True),
            DownBlock(2 * ch, 2 * ch),
            DownBlock(2 * ch, 2 * ch, down=False),
            DownBlock(2 * ch, 2 * ch, down=False))
        self.affine = nn.Linear(1, 1)
        nn.init.constant_(self.affine.weight, -1.0)
        nn.init.constant_(self.affine.bias, 1.0)

    def forward(self, x, x_fake, y):
        h = F.relu(self.blocks(torch.cat([x, x_fake]))).sum((2, 3))           # (2B, 2ch)
        ours, theirs = h.chunk(2)
        return self.affine((ours - theirs).norm(dim=1, keepdim=True))[:, 0]   # (B,)

class Unlabeled(BinaryScorer):
    """C_b, told the same label for every image."""
    def forward(self, x, x_fake, y):
        return super().forward(x, x_fake, torch.zeros_like(y))

ROWS = {
    "compare": Trained(Comparer, "compare", "paper.scorers train_scorer --scorer compare"),
    "unlabeled": Trained(Unlabeled, "unlabeled", "paper.scorers train_scorer --scorer unlabeled")}

def main():
    """The script of this name, with these rows."""
    SCORERS.update(ROWS)
    script, *argv = sys.argv[1:] or [""]
    scripts = {"train_scorer": train_scorer.main, "evaluate": evaluate.main}
    if script not in scripts:
        raise ValueError(f"name a script first: {' or '.join(scripts)}")
    scripts[script](argv)

if __name__ == "__main__":
    run_script(main)
