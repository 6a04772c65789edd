"""Ablations of one trained run: which scorers (Table 4), mask styles (Table 11), more masks.

    python -m paper.ablate --run runs/digits                 # writes RUN/ablation.json
    python -m paper.ablate --run runs/digits --subsets       # Table 4 alone, from RUN/scores.csv
"""

from itertools import combinations, product
from pathlib import Path

import torch
import torch.nn.functional as F

from evaluate import (LABELINGS, add_joint, format_table, gather_sets, methods_of, provenance,
                      tabulate, write_json)
from moodcat import RULES, ImageMask
from paper.common import Run, read_json, read_scores, run_parser
from train_gen import run_script

MASKS = (8, 4, 2, 1)
GRID = 4  # "patch" and "shuffle" cut the image into GRID x GRID squares

class StyledMask:
    """Table 11's other masks as MoodCat's mask f(x, i) -> (x_m, M): "none"; "fixed", a centred
    square of that share of the area; "patch", that share of a 4 x 4 grid; "shuffle", the grid's
    squares permuted, nothing removed. x (B, C, H, W); chance follows i alone. Raises ValueError."""

    def __init__(self, style, ratio=0.3):
        if style not in ("none", "fixed", "patch", "shuffle") or not 0 <= ratio <= 1:
            raise ValueError(f"no mask {style!r} of {ratio}: none, fixed, patch, shuffle; 0 to 1")
        self.settings = dict(style=style, ratio=ratio)

    def __call__(self, x, i=0):
        style, ratio, (H, W) = self.settings["style"], self.settings["ratio"], x.shape[2:]
        if style in ("patch", "shuffle") and (H % GRID or W % GRID):
            raise ValueError(f"mask style {style!r} needs sides that are multiples of {GRID}")
        order = torch.randperm(GRID**2, generator=torch.Generator().manual_seed(i)).to(x.device)
        mask = torch.zeros(len(x), 1, H, W, dtype=torch.bool, device=x.device)
        if style == "fixed":
            h, w = (round(side * ratio**0.5) for side in (H, W))
            top, left = (H - h) // 2, (W - w) // 2
            mask[:, :, top:top + h, left:left + w] = True
        elif style == "patch":
            squares = (order < round(ratio * GRID**2)).view(GRID, GRID)
            mask |= squares.repeat_interleave(H // GRID, 0).repeat_interleave(W // GRID, 1)
        elif style == "shuffle":
            cut = dict(kernel_size=(H // GRID, W // GRID), stride=(H // GRID, W // GRID))
            x = F.fold(F.unfold(x, **cut)[:, :, order], (H, W), **cut)
        return x.masked_fill(mask, 0.0), mask

STYLES = {"none": StyledMask("none"), "fixed 0.1": StyledMask("fixed", 0.1),
          "fixed 0.3": StyledMask("fixed"), "patch 0.3": StyledMask("patch"),
          "shuffle": StyledMask("shuffle"), "random": ImageMask(),
          "random 0.3 to 0.5": ImageMask((0.3, 0.5))}

def subsets(scored, held, names):
    """To each set of scores the joint scores of every subset of the scorers `names` (Table 4), as
    columns "cb+ssim min-p" and so on; one alone is its own."""
    for own in [own for n in range(2, len(names) + 1) for own in combinations(names, n)]:
        copies = {key: dict(s) for key, s in scored.items()}
        add_joint(copies, held, list(own))
        for rule, (key, s) in product(RULES, scored.items()):
            s.update({f"{p}{'+'.join(own)} {rule}": copies[key][p + rule] for p in ("", "oracle ")})

def main(argv=None):
    """Score the run under every variation, write RUN/ablation.json, print the tables."""
    parser = run_parser(__doc__)
    parser.add_argument("--subsets", action="store_true", help="Table 4 alone, from RUN/scores.csv")
    args = parser.parse_args(argv)
    path, content = Path(args.run, "ablation.json"), {}
    if args.subsets:
        scored, names = read_scores(args.run), read_json(path.with_name("results.json"))["scorers"]
        held = scored.pop("held-out")
    else:
        run = Run(args)
        names, sets = run.names, gather_sets(args, run.about, run.trained)
        variants = {f"mask {name}": (mask, 1) for name, mask in STYLES.items()}
        variants.update({f"masks {n}": (None, n) for n in MASKS})
        for title, (mask, n) in variants.items():  # a single random mask is last: the subsets' own
            detector, held = run.detector(mask, n)
            scored = run.score(detector, held, sets)
            content[title] = tabulate(scored, methods_of(scored), "predicted_labels")
    names = ["EBO" if name == "energy" else name for name in names]  # energy's column
    subsets(scored, held, names)
    content.update({f"subsets, {k}": tabulate(scored, methods_of(scored), k) for k in LABELINGS})
    for title, table in content.items():
        print(f"\n{title}\n{format_table(table)}")
    old = read_json(path) if path.exists() else {}
    write_json(path, {**old, **content, "about": dict(provenance(), scorers=names)})

if __name__ == "__main__":
    run_script(main)
