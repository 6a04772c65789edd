"""Out-of-distribution detection with a trained run, and its numbers. Trains nothing.

    python evaluate.py                                       # digits, after the other two
    python evaluate.py --run runs/cifar10 --ood cifar100 svhn dtd FOLDER
    python evaluate.py --run runs/cifar10 --scorers paper    # C_b, LPIPS, DISTS: fetches 528 MB
    python evaluate.py --run runs/mine --classifier mine.pt2 # what train_scorer.py was given
    python evaluate.py --run runs/cifar10 --images my_photos # verdicts on your own pictures

In-distribution: the run's test split. OOD: its images of other classes ("unknown") and the sets
after --ood. Writes detector.pt, results.json and scores.csv to RUN or --out.
"""

import csv
import io
import json
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from moodcat import (RULES, SCORERS, ImageMask, MoodCat, Trained, concatenated, fit_calibration,
                     joint_scores, load_checkpoint, load_weights, write_whole)
from train_gen import (TORCHVISION, Parser, command_line, find_images, image_files, image_hashes,
                       read_images, run_script, to_float)
from train_scorer import (fingerprint, load_classifier, load_generator, predict, training_split,
                          weaknesses)

PROTOCOLS = {  # the labels under which in-distribution images are scored, and OOD images
    "y = C(x)": ("C(x)", "C(x)"),            # the headline: what a deployed detector can do
    "oracle labels": ("given", "given"),     # the authors' code: the truth; OOD: a random label
    "true in-distribution": ("given", "C(x)")}
DEFAULT_SCORERS = ["cb", "ssim", "energy"]  # these need no download
PAPER_SCORERS = ["cb", "lpips", "dists"]    # --scorers paper
TPR = 0.95                   # share of in-distribution images to accept
ODIN_TEMPERATURE = 1000.0    # its paper's defaults; its step of 0.0014 is for images in [0, 1], ...
ODIN_STEP = 2 * 0.0014       # ... ours span twice that

def evaluate(args, out):
    """Calibrate and save the detector, score every set, write and print the numbers."""
    run = TrainedRun(args)
    sets = gather_sets(args, run)
    detector = MoodCat(run.G, run.scorers, run.mask, args.masks, run.rule)

    # 1. Calibrate on held-out training images under y = C(x): no test image chooses anything.
    held_out = score_set(detector, run.classifier, "held-out", *run.held_out[:2])
    reference = held_out["held-out", "C(x)"]
    calibrate(detector, run, reference)
    detector.save(out / "detector.pt")
    if len(sets) == 1:
        print("the detector is calibrated; for numbers, name OOD sets after --ood")
        return warn(detector)

    # 2. Score every set twice: under the prediction, and under a label that is given.
    scored = {}
    for name, (x, truth, _) in sets.items():
        scored |= score_set(detector, run.classifier, name, x, truth)
    add_joint_scores(scored | held_out, reference.scores, run.scorers)

    # 3. Every OOD set against the in-distribution test images, under each protocol.
    tables = {protocol: tabulate(scored, *labels) for protocol, labels in PROTOCOLS.items()}
    report(out, run, detector, scored, tables)
    write_csv(out / "scores.csv", scored | held_out, sets, run)

class Scored(NamedTuple):
    """N images under labels y (N,): scores {method: (N,)}, higher = in-distribution; the truth
    (N,), -1 = OOD. Kept as scored[set, labels], labels "C(x)" or "given"."""
    truth: torch.Tensor
    y: torch.Tensor
    scores: dict

def score_set(detector, classifier, name, x, truth):
    """uint8 images x (N, C, S, S), the truth (N,), -1 = OOD -> {(name, labels): Scored}. A label
    that is given is the truth, for an OOD image a random one."""
    K = detector.generator.settings["num_classes"]
    logits = predict(classifier, x, K)
    random = torch.randint(K, truth.shape, generator=torch.Generator().manual_seed(0))
    given = torch.where(truth >= 0, truth, random.to(truth.device))
    free = {"energy": logits.logsumexp(1), **odin(classifier, x)}  # whatever the label
    scored = {}
    for labels, y in {"C(x)": logits.argmax(1), "given": given}.items():
        # log p(y given x): where y = C(x) it orders images as MSP does
        msp = -F.cross_entropy(logits, y, reduction="none")                   # (N,)
        chunks = []
        for rows in tqdm(torch.arange(len(x)).split(256), name):
            chunks.append(detector.mean_mismatch(to_float(x[rows]), y[rows]))
        scores = {"MSP": msp, **concatenated(chunks), **free}
        scored[name, labels] = Scored(truth.cpu(), y.cpu(), {k: v.cpu() for k, v in scores.items()})
    return scored

def tabulate(scored, id_labels, ood_labels):
    """{method: {set: metrics}} of a protocol. In-distribution images inside an OOD set join the
    test images."""
    test = scored["in-distribution", id_labels]
    table = {method: {} for method in test.scores}
    for name, labels in scored:
        if name == "in-distribution" or labels != ood_labels:
            continue  # a set stands there twice, once for each kind of labels
        inside = scored[name, id_labels]
        outside = scored[name, ood_labels]
        known = inside.truth >= 0
        accuracy = share_right(scored["in-distribution", "C(x)"], scored[name, "C(x)"])
        for method, rows in table.items():
            id_scores = torch.cat([test.scores[method], inside.scores[method][known]])
            metrics = ood_metrics(id_scores, outside.scores[method][~known])
            rows[name] = dict(metrics, accuracy=accuracy)
    return table

def ood_metrics(id_scores, ood_scores):
    """fpr95, auroc, aupr_in, aupr_out as fractions; scores (N,) and (M,), higher = in-distribution,
    the positive class (section 4.2). FPR@TPR95 accepts from the k-th largest in-distribution score,
    k = floor(0.95 N). AUPR is the trapezoid under the curve. Raises ValueError."""
    from sklearn.metrics import auc, precision_recall_curve, roc_auc_score  # takes a second
    inside = np.asarray(id_scores, float)
    outside = np.asarray(ood_scores, float)
    scores = np.concatenate([inside, outside])
    if not (len(inside) and len(outside) and np.isfinite(scores).all()):
        raise ValueError("metrics need finite scores of at least one image on each side")
    is_id = np.arange(len(scores)) < len(inside)
    k = max(1, int(0.95 * len(inside) + 1e-9))
    threshold = np.sort(inside)[-k]

    def aupr(positive, scores):
        precision, recall, _ = precision_recall_curve(positive, scores)
        return float(auc(recall, precision))

    return dict(fpr95=float((outside >= threshold).mean()),
                auroc=roc_auc_score(is_id, scores),
                aupr_in=aupr(is_id, scores),
                aupr_out=aupr(~is_id, -scores))

def main(argv=None):
    """Read the command line; judge pictures, or evaluate."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--ood", nargs="+", default=[], help="cifar10, cifar100, svhn, dtd, folders")
    add("--out", help="folder for the results [RUN]")
    add("--images", help="judge a picture or a folder of them")
    args = parser.parse_args(argv)
    fixed = [name for name in ("scorers", "rule", "masks", "calibrate", "seed", "ood", "out")
             if getattr(args, name) != parser.get_default(name)]
    if args.images and fixed:
        raise ValueError(f"--images goes by detector.pt as it is: leave out --{fixed[0]}")
    out = Path(args.out or args.run)
    for name in {*args.ood, args.calibrate} - {*TORCHVISION, None}:
        image_files(name)  # a wrong folder is noticed before the work
    if args.out:
        out.mkdir(parents=True, exist_ok=True)  # what cannot be written is noticed before the work
    if args.images:
        judge_images(args)
    else:
        evaluate(args, out)

# --- Below: what serves them. The protocols and the numbers are above. ---------------------------
COLUMNS = dict(fpr95="FPR@TPR95", auroc="AUROC", aupr_in="AUPR-In", aupr_out="AUPR-Out",
               accuracy="accuracy")

def make_parser(doc):
    """The flags that say how a run is scored."""
    parser = Parser(doc)
    add = parser.add_argument
    add("--scorers", nargs="+", choices=[*SCORERS, "paper"], default=DEFAULT_SCORERS,
        help=f"paper: {PAPER_SCORERS}, which fetch 528 MB [%(default)s]")
    add("--rule", choices=[*RULES, *SCORERS], help="what rejects: a joint score, or a scorer alone "
        "[digits fisher; photographs energy, as development chose]")
    add("--masks", type=int, default=1, help="average each score over so many masks [%(default)s]")
    add("--classifier", help="another run's, or a program, as trained with")
    add("--calibrate", help="folder of <class>/ with images that no net has seen, to fix the "
        "thresholds [held-out training images]")
    add("--seed", type=int, default=0, help="of the masks [%(default)s]")
    return parser

class TrainedRun:
    """What a run's trainings have left, by the flags `args`: `G` and its checkpoint `generator`,
    training split `data`, `classes`, `classifier` and its id, `scorers` {name: f}, `trained`
    {name: checkpoint} of G and trained scorers, `mask`, `rule`; `held_out`, images, labels and
    names that fix the thresholds. Raises OSError or ValueError."""
    def __init__(self, args):
        self.args = args
        self.G, self.generator = load_generator(args.run, args.device)
        settings = self.generator["settings"]
        self.classes = settings["classes"]
        self.classifier, self.classifier_id, _ = load_classifier(
            args.run, args.classifier, args.device, self.classes)
        self.mask = ImageMask(settings["mask_ratio"], args.seed, settings["mask"])
        self.scorers = {}
        self.trained = {"generator": self.generator}
        names = [PAPER_SCORERS if name == "paper" else [name] for name in args.scorers]
        for name in sum(names, []):
            row = SCORERS[name]
            if isinstance(row, Trained):
                path = Path(args.run, f"{row.checkpoint}.pt")
                saved = load_checkpoint(path, row.checkpoint, args.device)
                if saved["settings"]["generator"] != self.generator["id"]:
                    raise ValueError(f"{path} is of another generator: {row.command} --anew")
                self.trained[name] = saved
                self.scorers[name] = row.net(**saved["settings"]["sizes"])
                load_weights(self.scorers[name], saved["scorer"], path)
            else:
                self.scorers[name] = row(None, self.classifier)
        self.rule = args.rule or default_rule(settings["data"], self.scorers)
        self.data = training_split(args, self.generator)  # last: it reads the images
        self.held_out = *self.data.held_out_images(), self.data.names[self.data.held_out.cpu()]
        if args.calibrate:
            self.held_out = self.unseen_images(args.calibrate)

    def unseen_images(self, folder):
        """Images, labels and names of --calibrate. Raises OSError or ValueError."""
        own = self.data.other("", data=folder)
        others = torch.cat([self.data.hashes, self.data.other("test").hashes])
        if torch.isin(own.hashes, others).any():
            raise ValueError(f"{folder} has images of the training or test split: use others")
        return own.x, own.y, own.names

    def settings(self):
        """The settings of all that it consists of, as results.json has them."""
        settings = {name: {k: v for k, v in saved["settings"].items() if k != "extra_hashes"}
                    for name, saved in self.trained.items()}  # of 50,000 images as many lines
        settings["classifier"] = getattr(self.classifier, "settings", None)
        return settings

    def scoring(self):
        """How it is scored, as results.json has it."""
        return dict(classifier=self.classifier_id, scorers=list(self.scorers), masks=self.args.masks,
                    mask=self.mask.settings, rule=self.rule, calibrate=self.args.calibrate)

def default_rule(data, scorers):
    """What development splits chose: for photographs energy alone, where it is among the scorers."""
    return "energy" if data != "digits" and "energy" in scorers else "fisher"

def gather_sets(args, run):
    """What to report on: {set: (uint8 images, labels, names)}, "in-distribution" first; label -1 =
    OOD, otherwise the class. Raises OSError or ValueError."""
    test = run.data.other("test")
    # what lies outside: {set: (images, names)}
    outside = {"unknown": (test.unknown, test.unknown_names)} if len(test.unknown) else {}
    for name in args.ood:
        if name in TORCHVISION:
            title = name
            images, _, _ = find_images(name, "test")
            names = range(len(images))
        else:
            title = "/".join(Path(name).resolve().parts[-2:])
            images = names = image_files(name)
        if title in outside:
            raise ValueError(f"there are two sets {title!r}: rename a folder")
        outside[title] = read_images(images, *test.x.shape[1:3]).to(args.device), names

    sets = {"in-distribution": (test.x, test.y, test.names)}
    for title, (x, names) in outside.items():
        for name, saved in run.trained.items():
            if np.isin(image_hashes(x), saved["settings"].get("extra_hashes", [])).any():
                raise ValueError(f"images of the OOD set {title!r} trained {name}: use others")
        sets[title] = x, torch.full((len(x),), -1, device=x.device), names
    return sets

def odin(classifier, x):
    """ODIN of uint8 images x (N, C, S, S), {"ODIN": (N,)}, or {} where there is no gradient: it
    steps towards a higher softmax, then looks at that."""
    scores = []
    for chunk in x.split(256):
        images = to_float(chunk).requires_grad_(True)
        top = (classifier(images) / ODIN_TEMPERATURE).log_softmax(1).amax(1).sum()
        if not top.requires_grad:
            return {}
        moved = images + ODIN_STEP * torch.autograd.grad(top, images)[0].sign()
        with torch.no_grad():
            scores.append((classifier(moved) / ODIN_TEMPERATURE).softmax(1).amax(1))
    return {"ODIN": torch.cat(scores)}

def calibrate(detector, run, held_out):
    """Fix the detector by the held-out images, Scored under C(x); note where it is weak."""
    args = run.args
    scores = {name: held_out.scores[name] for name in detector.scorers}
    files = [Path(args.run, f"{saved['kind']}.pt") for saved in run.trained.values()]
    detector.calibration = dict(fit_calibration(scores, TPR), notes=dict(
        classes=run.classes, classifier=run.classifier_id,
        files={file.name: fingerprint(file.read_bytes()) for file in files},
        warnings=weaknesses(args, share_right(held_out), run.trained)))

def share_right(*sets):
    """The accuracy of C(x) on the in-distribution images of sets Scored under C(x)."""
    right = torch.cat([(s.y == s.truth)[s.truth >= 0] for s in sets])
    return right.double().mean().item()

def add_joint_scores(scored, held_out, scorers):
    """To each Scored the scores of RULES over the scorers, without and with energy, by the even
    half of the held-out images."""
    without = [name for name in scorers if name != "energy"]
    for title, names in (("", without), (" with energy", [*without, "energy"])):
        reference = {name: held_out[name][::2] for name in names}
        for s in scored.values() if names else ():
            for rule, values in joint_scores(s.scores, reference).items():
                s.scores[rule + title] = values

def report(out, run, detector, scored, tables):
    """The numbers, written to OUT/results.json and printed."""
    rule = detector.rule
    joint = rule + " with energy" * (rule in RULES and "energy" in detector.scorers)
    n = {}
    flagged = {}
    for (name, labels), s in scored.items():
        if labels == "C(x)":
            n[name] = len(s.truth)
            rejected = detector.rejects({rule: s.scores[joint]}).double()
            flagged[name] = rejected.mean().item()
    write_json(out / "results.json", dict(
        provenance(), settings=run.settings(), n=n, flagged=flagged, tpr=TPR, **run.scoring(),
        **tables))
    for protocol, table in tables.items():
        print(f"\n{protocol}\n{format_table(table)}")
    print(f"\nFlagged as OOD by {joint}, its threshold from held-out images:",
          *(f"{name} {share:.1%}" for name, share in flagged.items()))
    print(judgement(tables["y = C(x)"], joint))
    warn(detector)

def warn(detector):
    """Print what the detector's calibration noted."""
    for line in detector.calibration["notes"]["warnings"]:
        print("warning:", line)

def judgement(table, joint):
    """What a table {method: {set: metrics}} says of the detector, in a sentence."""
    auroc = {method: 100 * np.mean([row["auroc"] for row in rows.values()])
             for method, rows in table.items()}
    best = max(auroc, key=auroc.get)
    against = [f"{'beats' if auroc[joint] > auroc[name] else 'does not beat'} {name} "
               f"({auroc[joint] - auroc[name]:+.1f})" for name in ("energy", "MSP") if name != joint]
    return (f"On these images, by mean AUROC under y = C(x): best is {best} with {auroc[best]:.1f}; "
            f"the detector, {joint}, has {auroc[joint]:.1f} and {' and '.join(against)}.")

def format_table(table):
    """The rows of Table 1, in percent."""
    head = "".join(f"{title:>11s}" for title in COLUMNS.values())
    lines = [f"{'method':34s}{'OOD':24s}{head}"]
    for method, rows in table.items():
        for name, row in rows.items():
            numbers = "".join(f"{100 * row[c]:11.2f}" for c in COLUMNS)
            lines.append(f"{method:34s}{name:24s}{numbers}")
    return "\n".join(lines)

def write_csv(path, scored, sets, run):
    """A line an image and label: set, labels, image, truth, y, scores."""
    names = {name: images for name, (_, _, images) in sets.items()}
    names["held-out"] = run.held_out[2]
    called = np.array([*run.classes, "OOD"])  # -1 is the last
    lines = [["set", "labels", "image", "truth", "y", *scored["in-distribution", "C(x)"].scores]]
    for (name, labels), s in scored.items():
        columns = [values.tolist() for values in s.scores.values()]
        for row in zip(names[name], called[s.truth], called[s.y], *columns):
            lines.append([name, labels, *row])
    text = io.StringIO()
    csv.writer(text).writerows(lines)
    write_whole(path, text.getvalue().encode(errors="surrogateescape"))

def write_json(path, content):
    """Write a dict to `path`, whole or not at all. Raises OSError."""
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())

def provenance():
    """What a number depends on beside its settings: command, revision of this code, versions."""
    revision = subprocess.run("git describe --always --dirty=+", shell=True, text=True,
                              cwd=Path(__file__).parent, capture_output=True).stdout.strip()
    versions = {name: version(name) for name in ("torch", "scikit-learn", "numpy")}
    return dict(command=command_line(), revision=revision, versions=versions,
                threads=torch.get_num_threads())

# --- Your pictures -------------------------------------------------------------------------------
def load_detector(args):
    """RUN/detector.pt and the classifier that it was calibrated for. Raises OSError or ValueError."""
    path = Path(args.run, "detector.pt")
    notes = load_checkpoint(path, "detector")["calibration"]["notes"]
    other = f"{path} was calibrated for another classifier: name that one with --classifier"
    if not (args.classifier or Path(args.run, "classifier.pt").exists()):
        raise ValueError(other)
    classifier, classifier_id, _ = load_classifier(args.run, args.classifier, args.device)
    if notes["classifier"] != classifier_id:
        raise ValueError(other)
    return MoodCat.load(path, args.device, classifier), classifier

def judge_images(args):
    """--images: a line for each of the user's pictures."""
    detector, classifier = load_detector(args)
    notes = detector.calibration["notes"]
    classes = notes["classes"]
    print(f"{args.run}: {', '.join(classes)}; judged by {detector.rule}")
    for name, id in notes.get("files", {}).items():
        file = Path(args.run, name)
        if file.exists() and fingerprint(file.read_bytes()) != id:
            print(f"warning: {file} is newer than the detector: run evaluate.py again")
    warn(detector)

    # the pictures, each on its own: one that cannot be read is a line, too
    settings = detector.generator.settings
    verdicts = []
    print("image", "prediction", *detector.scorers, *RULES, "verdict", sep="\t")
    for file in image_files(args.images):
        line = [repr(file)[1:-1]]
        try:
            x = read_images([file], settings["channels"], settings["image_size"]).to(args.device)
        except OSError as error:
            line.append(f"unreadable: {error.__cause__}")
        else:
            y = predict(classifier, x, len(classes)).argmax(1)
            scores = detector.score(to_float(x), y)
            verdicts.append(detector.rejects(scores).item())
            line += [classes[y], *(f"{score.item():.4f}" for score in scores.values()),
                     "OOD" if verdicts[-1] else "in-distribution"]
        print(*line, sep="\t")
    if not verdicts:
        raise OSError(f"{args.images}: no picture can be read")
    print(f"{sum(verdicts)} of {len(verdicts)} rejected")

if __name__ == "__main__":
    run_script(main)
