"""Pictures of a run, at most 1,000 px wide, written into --out (RUN, where none is named).

    python -m paper.figures --run runs/digits
    python -m paper.figures --run runs/digits --only method --out results
    python -m paper.figures --run runs/digits --beside runs/cifar10 --only labels --out results

method.png: Figure 2 redrawn, of the known and the unknown test images the one of median score.
masks.png: Figure 4 on the same two. labels.png: x' under the right and under a wrong label, and what
the classifier reads. panel.png: Figure 6, ten test images of either kind; failures.png: Figure
8. histograms.png, roc.png: scores.csv. curves.png: the logs of the trainings.
"""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from evaluate import make_parser
from paper.ablate import STYLES
from paper.common import load_with_test, read_scores
from train_gen import find_images, run_script, to_float
from train_scorer import predict

# --- The test images, by a rule that looks at no score or takes the median -----------------------
def load(args):
    """RUN's detector, its classes and the test images {kind: (float x (N, C, S, S), C(x) (N,), true
    class names)}. Raises OSError or ValueError."""
    detector, classifier, test = load_with_test(args)
    data = test.source
    classes = test.classes
    if not len(test.unknown):
        raise ValueError(f"{data} has no test image of an unknown class: this figure needs some")
    _, labels, names = find_images(data, "test")
    truth = np.array(names)[np.array(labels)]
    known = np.isin(truth, classes)
    y = predict(classifier, test.x, len(classes)).argmax(1)
    y_unknown = predict(classifier, test.unknown, len(classes)).argmax(1)
    images = {"in-distribution": (to_float(test.x), y, truth[known]),
              "OOD": (to_float(test.unknown), y_unknown, truth[~known])}
    return detector, classes, images

def medians(detector, images):
    """Of each kind the image of median score: {kind: (x (1, C, S, S), C(x) (1,), true class)}."""
    chosen = {}
    for kind, (x, y, truth) in images.items():
        order = detector.score(x, y)[detector.rule].argsort()
        i = order[len(order) // 2].item()
        chosen[kind] = x[i:i + 1], y[i:i + 1], truth[i]
    return chosen

def printable(text):
    """Names of classes and sets may be anything."""
    return text.encode(errors="backslashreplace").decode()

# --- The figures ---------------------------------------------------------------------------------
def show(ax, image, title=""):
    """image (1, C, S, S) in [-1, 1], without axes."""
    pixels = (image[0].cpu().permute(1, 2, 0).numpy().squeeze() + 1) / 2
    ax.imshow(pixels, cmap="gray", vmin=0, vmax=1)
    ax.set_title(printable(title), fontsize=11, parse_math=False)
    ax.set(xticks=[], yticks=[], frame_on=False)

@torch.no_grad()
def draw_method(args):
    """Figure 2, a row an image: x, M(x), x' = G(M(x), y), y = C(x), C_b's score, the verdict."""
    detector, classes, images = load(args)
    fig = Figure(figsize=(10, 5))
    axes = fig.subplots(2, 4, gridspec_kw=dict(wspace=0.45))
    for row, (kind, (x, y, truth)) in zip(axes, medians(detector, images).items()):
        _, x_m, x_fake = detector.mismatch(x, y)
        scores = detector.score(x, y)
        predicted = classes[y]
        show(row[0], x, f"{kind}, a {truth}: x")
        show(row[1], x_m, "masked: M(x)")
        show(row[2], x_fake, f"synthesis: x' = G(M(x), {predicted})")
        for ax, text in zip(row, ("mask", f"C(x) = {predicted}", "compare")):
            ax.text(1.22, 0.57, printable(text), fontsize=11, ha="center", transform=ax.transAxes)
            ax.annotate("", (1.42, 0.5), (1.03, 0.5), "axes fraction",
                        arrowprops=dict(arrowstyle="->"))
        verdict = "accepted"
        color = "tab:green"
        if detector.rejects(scores):
            verdict = "OOD: rejected"
            color = "tab:red"
        if "cb" in scores:
            verdict = f"C_b: {scores['cb'].item():.2f}\n{verdict}"
        row[3].text(0, 0.5, verdict, fontsize=15, va="center", linespacing=1.4, color=color)
        row[3].axis("off")
    fig.subplots_adjust(0.01, 0.02, 0.99, 0.93)
    return fig

@torch.no_grad()
def draw_labels(args):
    """Of up to six classes the first test image, x' under its label and under the next, and below
    each what the classifier reads off it; a block a run."""
    runs = [args.run, *args.beside]
    fig = Figure(figsize=(10, 6.4 / len(runs)), layout="constrained")
    for block, run in zip(fig.subfigures(1, len(runs), squeeze=False)[0], runs):
        detector, classifier, test = load_with_test(Namespace(**{**vars(args), "run": run}))
        K = len(test.classes)
        axes = block.subplots(3, min(6, K))
        for k, column in enumerate(axes.T):
            label = torch.tensor([k], device=test.y.device)
            x = to_float(test.x[test.y == k][:1])
            _, _, right = detector.mismatch(x, label)
            _, _, wrong = detector.mismatch(x, (label + 1) % K)
            for ax, image in zip(column, (x, right, wrong)):
                show(ax, image)
                read = test.classes[classifier(image).argmax(1)]
                ax.set_xlabel(printable(read), fontsize=9, parse_math=False)
        for ax, title in zip(axes[:, 0], ("x", "its label", "the next")):
            ax.set_ylabel(title)
    return fig

@torch.no_grad()
def draw_masks(args):
    """Figure 4: both images under every mask style, each synthesised as C says of the OOD image."""
    detector, classes, images = load(args)
    chosen = medians(detector, images)
    _, label, _ = chosen["OOD"]
    fig = Figure(figsize=(10, 7.4), layout="tight")
    axes = fig.subplots(4, len(STYLES))
    for i, (kind, (x, _, truth)) in enumerate(chosen.items()):
        for j, (style, mask) in enumerate(STYLES.items()):
            x_m, _ = mask(x, 0)
            x_fake, _, _ = detector.generator(x_m, label)
            show(axes[2 * i, j], x_m, style.replace(" to", "\nto"))
            show(axes[2 * i + 1, j], x_fake, f"{truth} as {classes[label]}")
    return fig

def draw_panel(args):
    """The panel of the run's known and unknown test images."""
    detector, classes, images = load(args)
    return panel(detector, classes, {kind: (x, y) for kind, (x, y, _) in images.items()})

def draw_failures(args):
    """Figure 8: the four rejected known images of the lowest scores, and the four accepted unknown
    ones of the highest, or as many as there are. Raises ValueError if there is none."""
    detector, classes, images = load(args)
    sets = {}
    for kind, (x, y, _) in images.items():
        scores = detector.score(x, y)
        known = kind == "in-distribution"
        wrong = detector.rejects(scores) == known
        order = scores[detector.rule].argsort(descending=not known)
        rows = order[wrong[order]][:4]
        if len(rows):
            title = f"{kind}, {'rejected' if known else 'accepted'}"
            sets[title] = x[rows], y[rows]
    if not sets:
        raise ValueError("the detector makes no error on these images: no failures to draw")
    return panel(detector, classes, sets, 4)

@torch.no_grad()
def panel(detector, classes, sets, n=10):
    """Figures 6 and 7: of each set {title: (float x (N, C, S, S), C(x) (N,))} n images at even
    distances: input, masked image, synthesis; below them C(x), joint score and verdict."""
    fig = Figure(figsize=(10, 3.4 * len(sets)), layout="constrained")
    blocks = fig.subfigures(len(sets), squeeze=False)[:, 0]
    for block, (title, (x, y)) in zip(blocks, sets.items()):
        some = torch.linspace(0, len(x) - 1, min(n, len(x))).long()
        x = x[some].to(detector.device)
        y = y[some].to(detector.device)
        _, x_m, x_fake = detector.mismatch(x, y)
        scores = detector.score(x, y)
        rejected = detector.rejects(scores)
        framed = [F.pad(images, (1, 1, 1, 1), value=1.0) for images in (x, x_m, x_fake)]
        tall = torch.cat(framed, 2)                                   # (n, C, 3 (S + 2), S + 2)
        block.suptitle(f"{printable(title)}: input, masked, synthesis", parse_math=False)
        for i, ax in enumerate(block.subplots(1, len(x), squeeze=False)[0]):
            show(ax, tall[i:i + 1])
            label = printable(classes[y[i]])[:12]
            joint = scores[detector.rule][i]
            verdict = "OOD" if rejected[i] else "accepted"
            color = "tab:red" if rejected[i] else "black"
            text = f"{label}\n{joint:.2f}\n{verdict}"
            ax.set_xlabel(text, color=color, parse_math=False)
    return fig

def predicted_scores(run):
    """RUN/scores.csv under y = C(x), without the held-out images: {set: Scored}."""
    return {name: s for (name, labels), s in read_scores(run).items()
            if labels == "C(x)" and name != "held-out"}

def draw_histograms(args):
    """Each method's scores by set, clipped to the middle 98%."""
    sets = predicted_scores(args.run)
    methods = list(sets["in-distribution"].scores)
    height = -(-len(methods) // 3)
    fig = Figure(figsize=(10, 2.8 * height), layout="tight")
    for ax, method in zip(fig.subplots(height, 3, squeeze=False).flat, methods):
        everything = torch.cat([s.scores[method] for s in sets.values()])
        low, high = np.percentile(everything, [1, 99])
        for name, s in sets.items():
            values = s.scores[method].clip(low, high).numpy()
            ax.hist(values, 30, density=True, alpha=0.5, label=printable(name))
        ax.set(title=method, yticks=[])
    fig.axes[0].legend()
    return fig

def draw_roc(args):
    """Each method's ROC curve, all OOD sets together."""
    from sklearn.metrics import RocCurveDisplay
    sets = predicted_scores(args.run)
    fig = Figure(figsize=(10, 10), layout="tight")
    ax = fig.subplots()
    is_id = torch.cat([s.truth for s in sets.values()]) >= 0
    for method in sets["in-distribution"].scores:
        score = torch.cat([s.scores[method] for s in sets.values()])
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
        names = dict.fromkeys(name for line in lines for name in line if name != "step")
        for name in names:
            steps = [line["step"] for line in lines if name in line]
            values = [line[name] for line in lines if name in line]
            ax.plot(steps, values, label=name)
        ax.set(title=log.stem, xlabel="step")
        ax.legend()
    return fig

FIGURES = dict(method=draw_method, labels=draw_labels, masks=draw_masks, panel=draw_panel,
               failures=draw_failures, histograms=draw_histograms, roc=draw_roc, curves=draw_curves)

def main(argv=None):
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES), help="[all]")
    parser.add_argument("--beside", nargs="+", default=[], metavar="RUN",
                        help="more runs for labels.png")
    parser.add_argument("--out", metavar="FOLDER", help="[RUN]")
    args = parser.parse_args(argv)
    for name in args.only:
        path = Path(args.out or args.run, f"{name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure = FIGURES[name](args)
        figure.savefig(path, dpi=100)  # 10 inches
        print(path)

if __name__ == "__main__":
    run_script(main)
