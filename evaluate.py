"""Out-of-distribution detection with a trained run, and its numbers. Trains nothing.

    python evaluate.py                                       # digits, after the other two
    python evaluate.py --run runs/cifar10 --ood cifar100 svhn dtd FOLDER
    python evaluate.py --run runs/cifar10 --scorers cb lpips-squeeze ssim --masks 4
    python evaluate.py --run runs/mine --classifier mine.pt  # what train_scorer.py was given
    python evaluate.py --run runs/cifar10 --images my_photos # verdicts on your own pictures

In-distribution: the run's test split. OOD: its images of other classes ("unknown") and the sets
after --ood. The headline uses y = C(x); the authors' protocol (true labels for in-distribution,
random labels for OOD images) follows. Held-out training images fix p-values and thresholds: no test
image chooses anything. Writes detector.pt, results.json, scores.csv and pictures to RUN or --out.
"""

import copy
import csv
import itertools
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from moodcat import SCORERS, ImageMask, MoodCat, fit_calibration, join, load_checkpoint
from train_gen import (Parser, Split, find_images, image_files, image_hashes, read_images,
                       run_script, to_float)
from train_scorer import load_classifier, load_run, predict, weaknesses

DEFAULT_SCORERS = dict(digits=["cb", "ssim", "energy"],  # the paper's for colour, and energy
                       colour=["cb", "lpips", "dists", "energy"])
TPR = 0.95                   # share of in-distribution images to accept
ODIN_TEMPERATURE = 1000.0    # its paper's defaults; its step of 0.0014 is for images in [0, 1], ...
ODIN_STEP = 2 * 0.0014       # ... ours span twice that
# prefixes of the columns for either side; "oracle": true in-distribution, random for OOD
LABELINGS = dict(predicted_labels=("", ""),             # y = C(x), the headline
                 oracle_labels=("oracle ", "oracle "),  # the authors' code
                 true_in_distribution=("oracle ", ""))  # the truth where there is one, else C(x)
COLUMNS = dict(fpr95="FPR@TPR95", auroc="AUROC", aupr_in="AUPR-In", aupr_out="AUPR-Out",
               accuracy="accuracy")

# --- Metrics (section 4.2) and baselines ---------------------------------------------------------
def ood_metrics(id_scores, ood_scores):
    """fpr95, auroc, aupr_in, aupr_out as fractions; scores (N,) and (M,), higher = in-distribution,
    the positive class (section 4.2). FPR@TPR95 accepts from the k-th largest in-distribution score,
    k = floor(0.95 N). AUPR is the trapezoid under the curve. Raises ValueError."""
    from sklearn.metrics import auc, precision_recall_curve, roc_auc_score
    inside, outside = (np.asarray(s, dtype=np.float64).ravel() for s in (id_scores, ood_scores))
    scores, is_id = np.r_[inside, outside], np.arange(len(inside) + len(outside)) < len(inside)
    if not len(inside) or not len(outside) or not np.isfinite(scores).all():
        raise ValueError("metrics need finite scores of at least one image on each side")
    threshold = np.sort(inside)[::-1][max(1, int(0.95 * len(inside) + 1e-9)) - 1]
    aupr = lambda positive, s: float(auc(*precision_recall_curve(positive, s)[1::-1]))
    return dict(fpr95=float((outside >= threshold).mean()),
                auroc=float(roc_auc_score(is_id, scores)),
                aupr_in=aupr(is_id, scores), aupr_out=aupr(~is_id, -scores))

def baselines(classifier, x, logits, y):
    """MSP, ODIN and energy (EBO) of float images x (B, C, S, S) with logits (B, K), higher =
    in-distribution: {name: (B,)}. MSP is log p(y given x): for y = C(x) it orders as MSP does."""
    scores = {"MSP": logits.log_softmax(1).gather(1, y[:, None])[:, 0], "EBO": logits.logsumexp(1)}
    with torch.enable_grad():  # ODIN steps towards a higher softmax, then looks at it
        x = x.clone().requires_grad_(True)
        top = (classifier(x) / ODIN_TEMPERATURE).log_softmax(1).max(1).values.sum()
    if top.requires_grad:  # a program without gradients has no ODIN
        moved = x.detach() + ODIN_STEP * torch.autograd.grad(top, x)[0].sign()
        with torch.no_grad():
            scores["ODIN"] = (classifier(moved) / ODIN_TEMPERATURE).softmax(1).max(1).values
    return scores

# --- What to score -------------------------------------------------------------------------------
def make_scorers(names, args, about, classifier):
    """The scorers of these names, the checkpoints of trained ones. Raises OSError, ValueError."""
    scorers, trained = {}, {}
    for name in names:
        if name not in SCORERS:
            raise ValueError(f"no scorer {name!r}: {', '.join(SCORERS)}")
        if name not in ("cb", "cb_extra"):
            scorers[name] = SCORERS[name](None, classifier)
            continue
        kind = name.replace("cb", "scorer")
        path = Path(args.run, f"{kind}.pt")
        saved = trained[name] = load_checkpoint(path, kind, args.device)
        settings = saved["settings"]
        if settings["generator"] != about["id"]:
            raise ValueError(f"{path} is of another generator.pt: delete it, run train_scorer.py")
        size = {k: settings[k] for k in ("ch", "channels")}
        scorers[name] = SCORERS[name](dict(size, num_classes=len(settings["classes"])), classifier)
        scorers[name].load_state_dict(saved["scorer"])
    return scorers, trained

def gather_sets(args, about, trained):
    """What to report on: {set: (uint8 images, labels, names)}, "in-distribution" first; label -1 =
    OOD, otherwise the class. Raises OSError or ValueError."""
    settings = about["settings"]
    test = Split(settings["data"], "test", settings["classes"], settings["image_size"], args.device)
    if test.all_classes != about["all_classes"]:
        raise ValueError(f"the test split has the classes {', '.join(test.all_classes)}, the "
                         f"training split {', '.join(about['all_classes'])}: they must agree")
    found = {"unknown": (test.unknown, test.unknown_names)} if len(test.unknown) else {}
    for name in args.ood:
        known = name in ("cifar10", "cifar100", "svhn", "dtd")
        images = find_images(name, "test")[0] if known else image_files(name)
        key = name if known else "/".join(Path(name).resolve().parts[-2:])
        if key in ("in-distribution", *found):
            raise ValueError(f"there are two sets {key!r}: rename a folder")
        x = read_images(images, settings["channels"], settings["image_size"])
        found[key] = x.to(args.device), range(len(images)) if known else images
    for key, (x, _) in found.items():
        for name, saved in trained.items():
            used = np.isin(image_hashes(x).numpy(), saved["settings"].get("extra_hashes", [])).sum()
            if used:
                raise ValueError(f"{used} images of the OOD set {key!r} trained {name}: use others")
    outside = {key: (x, torch.full((len(x),), -1), names) for key, (x, names) in found.items()}
    return {"in-distribution": (test.x, test.y, test.names), **outside}

# --- Scores of each image, and what follows from them --------------------------------------------
def score_set(detector, classifier, x, labels, title):
    """uint8 images x (N, C, S, S), labels (N,), -1 = OOD -> {column: (N,)} on the CPU: label,
    prediction, scores under y = C(x), "oracle ..." under the truth (a random label for OOD)."""
    labels, K = labels.cpu(), detector.generator.settings["num_classes"]
    random = torch.randint(K, labels.shape, generator=torch.Generator().manual_seed(0))
    oracle = torch.where(labels >= 0, labels, random)
    plain, parts = copy.copy(detector), []
    plain.scorers = {k: f for k, f in detector.scorers.items() if k != "energy"}  # that is EBO
    plain.calibration = None
    for rows in tqdm(torch.arange(len(x)).split(256), title, unit="batch"):
        chunk, images = x[rows.to(x.device)], to_float(x[rows.to(x.device)])
        logits = predict(classifier, chunk, K)
        y, told = logits.argmax(1), oracle[rows].to(x.device)
        part = dict(label=labels[rows], prediction=y, **baselines(classifier, images, logits, y))
        part["oracle MSP"] = logits.log_softmax(1).gather(1, told[:, None])[:, 0]
        for prefix, given in (("", y), ("oracle ", told)):
            part.update({prefix + k: s for k, s in plain.score(images, given).items()})
        parts.append({k: v.detach().cpu() for k, v in part.items()})
    return {k: torch.cat([part[k] for part in parts]) for k in parts[0]}

def calibrate(detector, held, about, trained, classifier_id):
    """Fix the detector by the held-out images' score_set(), with warnings where it is weak."""
    classes = about["settings"]["classes"]
    accuracy = (held["label"] == held["prediction"]).double().mean().item()
    weak = weaknesses(accuracy, len(classes), dict(generator=about, **trained))
    detector.calibration = dict(
        fit_calibration({k: held["EBO" if k == "energy" else k] for k in detector.scorers}, TPR),
        about=dict(classifier=classifier_id, classes=classes, warnings=weak))

def add_joint(scored, held, names):
    """In each set a column for each rule over `names`, without and with energy, by `held`."""
    names = [name for name in names if name != "energy"]
    for title, own in (("", names), (" with energy", [*names, "EBO"])):
        calibration = fit_calibration({name: held[name] for name in own}, TPR) if own else None
        for s, prefix in itertools.product(scored.values() if own else (), ("", "oracle ")):
            pick = {name: s.get(prefix + name, s[name]) for name in own}
            for rule, joint in join(pick, calibration["held_out"]).items():
                s[prefix + rule + title] = joint

def tabulate(scored, methods, labeling):
    """{method: {set: metrics}}, with "mean" and "std over sets" (ddof 1) of several.
    In-distribution images inside an OOD set join the test images."""
    (inside, outside), table, sets = LABELINGS[labeling], {}, dict(scored)
    test = sets.pop("in-distribution")
    get = lambda s, prefix, method: s.get(prefix + method, s[method])  # a label may change nothing
    for method in methods:
        rows = {}
        for name, s in sets.items():
            ood = s["label"] < 0
            known = torch.cat([test["label"], s["label"][~ood]])
            predicted = torch.cat([test["prediction"], s["prediction"][~ood]])
            id_scores = torch.cat([get(test, inside, method), get(s, inside, method)[~ood]])
            rows[name] = ood_metrics(id_scores, get(s, outside, method)[ood])
            rows[name]["accuracy"] = (known == predicted).double().mean().item()
        if len(rows) > 1:
            values = {c: [row[c] for row in rows.values()] for c in COLUMNS}
            rows["mean"] = {c: float(np.mean(v)) for c, v in values.items()}
            rows["std over sets"] = {c: float(np.std(v, ddof=1)) for c, v in values.items()}
        table[method] = rows
    return table

def methods_of(scored):
    """The score columns of {set: {column: (N,)}} that a table lists."""
    return [c for c in next(iter(scored.values()))
            if c not in ("label", "prediction") and not c.startswith("oracle ")]

def format_table(table):
    """The rows of Table 1, in percent."""
    wide = max(map(len, table)) + 2
    width = max(len(s) for rows in table.values() for s in rows) + 2
    lines = [f"{'method':{wide}s}{'OOD':{width}s}" + "".join(f"{c:>11s}" for c in COLUMNS.values())]
    for method, rows in table.items():
        for i, (name, row) in enumerate(rows.items()):
            lines.append(f"{'' if i else method:{wide}s}{name:{width}s}"
                         + "".join(f"{100 * row[c]:11.2f}" for c in COLUMNS))
    return "\n".join(lines)

def write_csv(path, scored, names, classes):
    """A line an image: set, image, label, prediction, scores; text that spreadsheets would run,
    by a leading "=" or the like, gets a quote."""
    text = lambda value: "'" * (str(value)[:1] in ("=", "+", "-", "@")) + str(value)
    columns, temporary = list(scored["in-distribution"]), Path(f"{path}.tmp")
    with open(temporary, "w", newline="", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["set", "image", *columns])
        for key, s in scored.items():
            values = [[text(classes[v]) if v >= 0 else "OOD" for v in s[c].tolist()]
                      if c in ("label", "prediction") else s[c].tolist() for c in columns]
            rows = zip(names[key], *values)
            writer.writerows([text(key), text(name), *row] for name, *row in rows)
    temporary.replace(path)

def write_json(path, content):
    """Write a dict to `path`, whole or not at all. Raises OSError."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.tmp").write_text(json.dumps(content, indent=1) + "\n")
    Path(f"{path}.tmp").replace(path)

def provenance():
    """What a number depends on beside its settings: command, revision of this code, versions."""
    revision = subprocess.run("git describe --always --dirty=+", shell=True, text=True,
                              cwd=Path(__file__).parent, capture_output=True).stdout.strip()
    packages = {p: version(p) for p in ("torch", "torchvision", "scikit-learn", "numpy")}
    command = " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    return dict(command=command, revision=revision or "unknown",
                versions=dict(packages, python=sys.version.split()[0]),
                threads=torch.get_num_threads())

# --- Pictures ------------------------------------------------------------------------------------
def draw_panel(path, detector, classes, blocks):
    """Figures 5 to 8: ten uint8 images (N, C, S, S) of each block (title, images, y) under labels y
    (N,): input, masked image, synthesis; below them label, joint score and verdict."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(9, 3.2 * len(blocks)), layout="constrained")
    parts = fig.subfigures(len(blocks), squeeze=False)[:, 0]
    plain = lambda text: text.encode(errors="backslashreplace").decode()  # names may be anything
    for part, (title, images, y) in zip(parts, blocks):
        x, y = to_float(images[:10]).to(detector.device), y[:10].to(detector.device)
        with torch.no_grad():
            _, x_m, x_fake = detector.synthesise(x, y)
        scores = detector.score(x, y)
        tall = torch.cat([F.pad(t, (1, 1, 1, 1), value=1.0) for t in (x, x_m, x_fake)], 2)
        tall = ((tall + 1) / 2).permute(0, 2, 3, 1).squeeze(3).cpu().numpy()     # (N, 3(S+2), S+2)
        part.suptitle(plain(f"{title}: input, masked, synthesis"), parse_math=False)
        axes = part.subplots(1, 10, subplot_kw=dict(xticks=[], yticks=[], frame_on=False))
        shown = zip(axes, tall, y, scores[detector.rule], detector.rejects(scores))
        for ax, image, label, score, ood in shown:
            ax.imshow(image, cmap="gray", vmin=0, vmax=1)
            words = f"{plain(classes[label])[:12]}\n{score:.2f}\n{'OOD' if ood else 'accepted'}"
            ax.set_xlabel(words, color="tab:red" if ood else "black", parse_math=False)
    fig.savefig(path, dpi=100, bbox_inches="tight")

# --- The two things this script does -------------------------------------------------------------
def judge_images(args, out):
    """--images: a line for each of the user's pictures, and a panel of the most suspicious."""
    path = Path(args.run, "detector.pt")
    if not path.exists():
        raise OSError(f"{path} does not exist: run evaluate.py first")
    classifier, classifier_id, _ = load_classifier(args.run, args.classifier, args.device)
    detector = MoodCat.load(path, args.device, classifier)
    about = (detector.calibration or {}).get("about")
    if not about or about["classifier"] != classifier_id:
        raise ValueError(f"{path} was calibrated for another classifier: see --classifier")
    for line in about["warnings"]:
        print(f"warning: {line}")
    want, files = detector.generator.settings, image_files(args.images)
    x = read_images(files, want["channels"], want["image_size"]).to(args.device)
    y = predict(classifier, x, want["num_classes"]).argmax(1)
    parts = [detector.score(to_float(xs), ys) for xs, ys in zip(x.split(1024), y.split(1024))]
    scores = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    ood = detector.rejects(scores)
    print("\t".join(["image", "prediction", *scores, "verdict"]))
    for i, file in enumerate(files):
        words = repr(file)[1:-1], about["classes"][y[i]], *(f"{s[i]:.4f}" for s in scores.values())
        print("\t".join([*words, "OOD" if ood[i] else "in-distribution"]))
    some = scores[detector.rule].argsort()[:10]
    blocks = [("your images, the most suspicious", x[some], y[some])]
    draw_panel(out / "images.png", detector, about["classes"], blocks)
    print(f"{int(ood.sum())} of {len(files)} rejected; {out / 'images.png'}")

def evaluate(args, out):
    """Calibrate and save the detector, score every set, write and print the numbers."""
    G, about, train = load_run(args)
    settings, classes = about["settings"], about["settings"]["classes"]
    classifier, classifier_id, _ = load_classifier(args.run, args.classifier, args.device, classes)
    names = args.scorers or DEFAULT_SCORERS["digits" if settings["data"] == "digits" else "colour"]
    scorers, trained = make_scorers(names, args, about, classifier)
    sets = gather_sets(args, about, trained)
    detector = MoodCat(G, scorers, ImageMask(settings["mask_ratio"], args.seed), args.masks)
    # everything is fixed on held-out training images at y = C(x)
    held = score_set(detector, classifier, train.x[train.held], train.y[train.held], "held-out")
    calibrate(detector, held, about, trained, classifier_id)
    detector.save(out / "detector.pt")
    for line in detector.calibration["about"]["warnings"]:
        print(f"warning: {line}")
    if len(sets) == 1:
        print(f"{out}/detector.pt is calibrated; for numbers, name OOD sets after --ood")
        return
    scored = {name: score_set(detector, classifier, x, y, name) for name, (x, y, _) in sets.items()}
    add_joint({**scored, "held-out": held}, held, list(scorers))
    report(args, out, detector, about, trained, scored, len(held["label"]))
    names = {name: image_names for name, (_, _, image_names) in sets.items()}
    names["held-out"] = train.names[train.held.cpu()]
    write_csv(out / "scores.csv", {**scored, "held-out": held}, names, classes)
    blocks = []
    for name, (x, _, _) in sets.items():
        some = np.random.default_rng(0).permutation(len(x))[:10]
        blocks.append((name, x[some], scored[name]["prediction"][some]))
    draw_panel(out / "panel.png", detector, classes, blocks)
    print(f"{out}: results.json, scores.csv, detector.pt, panel.png")

def report(args, out, detector, about, trained, scored, n_held):
    """Tables from the scores, written to OUT/results.json and printed."""
    methods = methods_of(scored)
    tables = {labeling: tabulate(scored, methods, labeling) for labeling in LABELINGS}
    n = {name: len(s["label"]) for name, s in scored.items()}
    own = detector.rule + " with energy" * ("energy" in detector.scorers)
    flagged = {name: detector.rejects({detector.rule: s[own]}).double().mean().item()
               for name, s in scored.items()}
    results = dict(
        provenance(), settings=about["settings"], n=n, n_held_out=n_held, flagged=flagged, tpr=TPR,
        steps={name: saved["step"] for name, saved in dict(trained, generator=about).items()},
        classifier=detector.calibration["about"]["classifier"], scorers=list(detector.scorers),
        mask=getattr(detector.mask, "settings", None), masks=detector.masks, rule=detector.rule,
        odin=dict(temperature=ODIN_TEMPERATURE, step=ODIN_STEP), **tables)
    write_json(out / "results.json", results)
    print(f"\nPredicted labels, y = C(x); percent; {', '.join(f'{k} {v}' for k, v in n.items())} "
          f"images\n{format_table(tables['predicted_labels'])}")
    print("\nThe same under three labelings, AUROC / FPR@TPR95: y = C(x); the authors' oracle "
          "labels\n(true in-distribution, random for OOD); true in-distribution, C(x) for OOD")
    for method in methods:
        if f"oracle {method}" in scored["in-distribution"]:
            rows = [table[method] for table in tables.values()]
            cells = [row.get("mean") or list(row.values())[0] for row in rows]
            cells = ["{auroc:12.2%} /{fpr95:7.2%}".format(**cell) for cell in cells]
            print(f"{'p(y given x)' if method == 'MSP' else method:20s}{''.join(cells)}")
    print(f"\nFlagged as OOD by {own}, threshold for {TPR:.0%} TPR on held-out images: "
          + ", ".join(f"{name} {share:.1%}" for name, share in flagged.items()))

def main(argv=None):
    """Read the command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--ood", nargs="+", default=[], metavar="SET", help="cifar10, cifar100, svhn, dtd, folders")
    add("--scorers", nargs="+", metavar="NAME", help=f"of {' '.join(SCORERS)} {DEFAULT_SCORERS}")
    add("--masks", type=int, default=1, help="average each score over so many masks [%(default)s]")
    add("--classifier", metavar="FILE", help="another run's, or a program, as trained with")
    add("--out", metavar="FOLDER", help="for the results [RUN]")
    add("--images", metavar="PATH", help="judge a picture or a folder of them")
    args = parser.parse_args(argv)
    shipped = Path(__file__).resolve().parent / "results" / "digits"
    missing = args.run == "runs/digits" and not Path(args.run).exists()
    if args.images and missing and shipped.exists():
        print(f"there is no {args.run}: the detector in {shipped} judges")
        args.run, args.out = str(shipped), args.out or "."
    out = Path(args.out or args.run)
    if args.out:
        out.mkdir(parents=True, exist_ok=True)
    if out.exists():  # what cannot be written is noticed before the work
        tempfile.TemporaryFile(dir=out).close()
    judge_images(args, out) if args.images else evaluate(args, out)

if __name__ == "__main__":
    run_script(main)
