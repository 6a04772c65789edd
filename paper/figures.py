"""Pictures of a run, at most 1,000 px wide, written into --out (RUN, where none is named).

    python -m paper.figures --run runs/digits
    python -m paper.figures --run runs/digits --only method --out results

method.png: Figure 2 redrawn, from the test image of median score of either kind. masks.png: Figure
4 on the same images. histograms.png, roc.png: scores.csv. curves.png: the logs of the trainings.
"""

import json
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from evaluate import methods_of
from moodcat import MoodCat
from paper.ablate import STYLES
from paper.common import read_scores, run_parser
from train_gen import Split, run_script, to_float
from train_scorer import load_classifier, predict

def show(ax, image, title):
    """image (1, C, S, S) in [-1, 1]."""
    image = (image[0].cpu().permute(1, 2, 0).numpy().squeeze() + 1) / 2
    ax.imshow(image, cmap="gray", vmin=0, vmax=1)
    ax.set_title(title, fontsize=11, parse_math=False)
    ax.axis("off")

def load(args):
    """RUN's detector, its classes and {kind: (x (1, C, S, S), y (1,))}: the known and the unknown
    test image of median joint score. Raises OSError or ValueError."""
    classifier, _, _ = load_classifier(args.run, args.classifier, args.device)
    detector = MoodCat.load(Path(args.run, "detector.pt"), args.device, classifier)
    classes, chosen = detector.calibration["about"]["classes"], {}
    test = Split(args.data or "digits", "test", classes, detector.generator.settings["image_size"])
    for kind, x in (("in-distribution", test.x), ("OOD", test.unknown)):
        x = x.to(detector.device)
        y = predict(classifier, x, len(classes)).argmax(1)
        i = detector.score(to_float(x), y)[detector.rule].argsort()[len(x) // 2, None]
        chosen[kind] = to_float(x[i]), y[i]
    return detector, classes, chosen

@torch.no_grad()
def draw_method(args):
    """Figure 2, a row an image: x, M(x), G(M(x), y) with y = C(x), scores, verdict."""
    detector, classes, chosen = load(args)
    fig = Figure(figsize=(10, 5))
    axes = fig.subplots(2, 4, gridspec_kw=dict(wspace=0.45))
    for row, (kind, (x, y)) in zip(axes, chosen.items()):
        (_, x_m, x_fake), scores = detector.synthesise(x, y), detector.score(x, y)
        titles = f"{kind}: x", "masked: M(x)", f"synthesis: x' = G(M(x), {classes[y]})"
        for ax, image, title in zip(row, (x, x_m, x_fake), titles):
            show(ax, image, title)
        for ax, text in zip(row, ("mask", f"C(x) = {classes[y]}", "compare")):
            ax.text(1.22, 0.57, text, fontsize=11, ha="center", transform=ax.transAxes)
            ax.annotate("", (1.42, 0.5), (1.03, 0.5), "axes fraction",
                        arrowprops=dict(arrowstyle="->"))
        lines = [f"{'C_b' if name == 'cb' else name} {scores[name].item():.2f}"
                 for name in (*detector.scorers, detector.rule)]
        ood = bool(detector.rejects(scores))
        lines.append("OOD: rejected" if ood else "accepted")
        row[3].text(0, 0.5, "\n".join(lines), fontsize=15, va="center", linespacing=1.4,
                    color="tab:red" if ood else "tab:green")
        row[3].axis("off")
    fig.subplots_adjust(0.01, 0.02, 0.99, 0.93)
    return fig

@torch.no_grad()
def draw_masks(args):
    """Figure 4: both images under every mask style, each synthesised as C says of the OOD image."""
    detector, classes, chosen = load(args)
    fig = Figure(figsize=(10, 7.4), layout="tight")
    axes = fig.subplots(4, 6)
    for rows, (kind, (x, _)) in zip((axes[:2], axes[2:]), chosen.items()):
        for top, below, (style, mask) in zip(*rows, STYLES.items()):
            x_m, _ = mask(x, 0)
            show(top, x_m, style)
            show(below, detector.generator(x_m, chosen["OOD"][1])[0],
                 f"{kind[:3]}, as {classes[chosen['OOD'][1]]}")
    return fig

def draw_histograms(args):
    """Each method's scores by set, clipped to the middle 98%."""
    scored = read_scores(args.run)
    methods, _ = methods_of(scored), scored.pop("held-out")
    height = -(-len(methods) // 3)
    fig = Figure(figsize=(10, 2.8 * height), layout="tight")
    for ax, method in zip(fig.subplots(height, 3).flat, methods):
        low, high = np.percentile(torch.cat([s[method] for s in scored.values()]), [1, 99])
        for name, s in scored.items():
            ax.hist(s[method].clip(low, high).numpy(), 30, density=True, alpha=0.5, label=name)
        ax.set(title=method, yticks=[])
    fig.axes[0].legend()
    return fig

def draw_roc(args):
    """Each method's ROC curve, all OOD sets together."""
    from sklearn.metrics import RocCurveDisplay
    scored = read_scores(args.run)
    methods, _ = methods_of(scored), scored.pop("held-out")
    fig = Figure(figsize=(10, 10), layout="tight")
    ax = fig.subplots()
    is_id = torch.cat([s["label"] for s in scored.values()]) >= 0
    for method in methods:
        score = torch.cat([s[method] for s in scored.values()])
        RocCurveDisplay.from_predictions(is_id, score, name=method, ax=ax)
    ax.set(xlabel="OOD images accepted", ylabel="in-distribution images accepted")
    return fig

def draw_curves(args):
    """What RUN/*.jsonl log, against the step. Raises OSError if there is none."""
    logs = sorted(Path(args.run).glob("*.jsonl"))
    if not logs:
        raise OSError(f"{args.run} has no log *.jsonl")
    fig = Figure(figsize=(10, 3.5), layout="tight")
    for ax, log in zip(fig.subplots(1, len(logs), squeeze=False)[0], logs):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        for key in dict.fromkeys(k for line in lines for k in line if k != "step"):
            ax.plot(*zip(*((line["step"], line[key]) for line in lines if key in line)), label=key)
        ax.set(title=log.stem, xlabel="step")
        ax.legend()
    return fig

FIGURES = dict(method=draw_method, masks=draw_masks, histograms=draw_histograms, roc=draw_roc,
               curves=draw_curves)

def main(argv=None):
    """Read the command line."""
    parser = run_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES), help="[all]")
    parser.add_argument("--out", metavar="FOLDER", help="[RUN]")
    args = parser.parse_args(argv)
    for name in args.only:
        path = Path(args.out or args.run, f"{name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        FIGURES[name](args).savefig(path, dpi=100)  # 10 inches
        print(path)

if __name__ == "__main__":
    run_script(main)
