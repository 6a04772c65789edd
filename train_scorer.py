"""Train C_b, the scorer (section 3.5, Figure 3), after the classifier that it protects.

    python train_scorer.py                                        # digits, after train_gen.py
    python train_scorer.py --run runs/cifar10 --net resnet18      # the paper's classifier, then C_b
    python train_scorer.py --run runs/mine --classifier mine.pt2  # your classifier instead
    python train_scorer.py --run runs/cifar10 --extra FOLDER      # then a second C_b: unlabeled data

--classifier takes another run's classifier.pt, or a torch.export or TorchScript program, images (B,
C, S, S) in [-1, 1] to logits (B, K) in the order of the classes; evaluate.py takes it, too. A
program can run code: use only one you trust. Writes RUN/classifier.pt and RUN/scorer.pt or
scorer_extra.pt, each with its log beside it.
"""

import hashlib
import io
import json
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from moodcat import (SCORERS, Generator, Trained, for_inference, hinge_loss,
                     load_checkpoint, load_weights, random_mask)
from train_gen import (LOG_EVERY, Parser, Run, Split, adam, averaged, count_steps,
                       image_files, image_hashes, parse, random_batch, read_images, run_script,
                       seed_step, to_float)

# rows as those of train_gen.SETTINGS
SCORER = dict(  #                                        the paper; why not here
    lr=        (1e-3,                                   "paper 5e-5; falls to 0 along a line"),
    batch_size=(32, 32, 96,                             "paper 96"),
    steps=     (500, 10.0, 80.0,                        "paper: not said; 10.0 are passes"),
    ch=        (8, 8, 32,                               "paper 32; C_b's channel multiplier"),
    mirror=    (False, True,                            "mirror and shift images: not for text"),
    bf16=      (False,                                  "nets in bfloat16"),
    seed=      (0,                                      "of all random numbers"))
CLASSIFIER = dict(
    net=                  ("conv",                      "paper resnet18; conv is a small one"),
    widths=               ([8, 16, 32, 64], [24, 32, 64, 128], [24, 64, 256, 256], "of the conv"),
    whiten=               (False, True,                 "the conv begins by whitening patches"),
    classifier_lr=        (0.1, 0.1, 0.4,               "the highest; up, then down to 0"),
    classifier_batch_size=(64, 64, 512,                 "paper: not said"),
    classifier_steps=     (300, 20.0, 100.0,            "paper: not said; 20.0 are passes"),
    smoothing=            (0.0,                         "paper: none; of the classifier's labels"))

# --- Figure 3 ------------------------------------------------------------------------------------
def train_step(C_b, G, opt, right, wrong, bf16=False):
    """right: images x, masked x_m (n, C, S, S) and labels y (n,) that belong to x; wrong: the same
    with labels that do not -> {name: loss}."""
    x, x_m, y = (torch.cat(both) for both in zip(right, wrong))
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        with torch.no_grad():                            # G is trained, it stands still
            x_fake = G(x_m, y)[0].float()                # x' under y and under y'
        score = C_b(x, x_fake, y).float()                # higher = in-distribution
    n = len(right[2])
    loss = hinge_loss(score[:n], score[n:])              # Eq. 2
    opt.zero_grad()
    loss.backward()
    opt.step()
    return dict(loss=loss.detach())

def train_scorer(args, row, G, data, unlabeled=None, **more):
    """Eq. 2 for the net of a row of SCORERS, into RUN/<row.checkpoint>.pt -> its Run. unlabeled
    (section 3.6): uint8 images u (M, C, S, S) and C(u) (M,), half of each batch; more: settings to
    record."""
    K = len(data.classes)
    x_all, y_all = data.training_images()
    torch.manual_seed(args.seed)
    C_b = row.net(K, args.ch, data.channels)
    opt = adam(C_b, args.lr, args.device)
    run = Run(row.checkpoint, args, [*SCORER, "mask", "mask_ratio"], data, args.steps,
              dict(more, sizes=C_b.settings), scorer=C_b, opt=opt)
    n_unlabeled = args.batch_size // 2 if unlabeled else 0
    # five times, in steps that are logged
    validate_every = max(1, args.steps // 5 // LOG_EVERY) * LOG_EVERY

    for step in range(run.step, args.steps):
        seed_step(args.seed, step)
        opt.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)
        # each image under its label y, and under y' != y, uniform over the other labels
        right, wrong = right_and_wrong(x_all, y_all, args.batch_size - n_unlabeled, K, args)
        if unlabeled:                                    # section 3.6: u can only be wrong
            _, more_wrong = right_and_wrong(*unlabeled, n_unlabeled, K, args)
            wrong = [torch.cat(both) for both in zip(wrong, more_wrong)]
        values = train_step(C_b, G, opt, right, wrong, args.bf16)
        if (step + 1) % validate_every == 0 or step + 1 == args.steps:
            values.update(validate(C_b, G, *data.held_out_images(), args))
        run.log(step, values)
        run.save()
    return run

def main(argv=None):
    """Train the classifier, unless there is one, then C_b."""
    parser = Parser(__doc__, {**SCORER, **CLASSIFIER}, net=["conv", "resnet18"])
    add = parser.add_argument
    add("--classifier", help="another run's, or a program, instead of training")
    add("--extra", help="folder of unlabeled images for a second C_b (section 3.6)")
    add("--scorer", default="cb", help="which net, a row of SCORERS [%(default)s]",
        choices=[name for name, row in SCORERS.items()
                 if isinstance(row, Trained) and name != "cb_extra"])

    # the net to train, and every flag that is not given; the classifier's, where it is trained here
    args = parser.parse_args(argv)
    if args.extra and args.scorer != "cb":
        raise ValueError("--extra is for C_b: leave out --scorer")
    name = "cb_extra" if args.extra else args.scorer
    row = SCORERS[name]
    own_classifier = not (args.classifier or args.extra)
    args = parse(parser, argv, {**SCORER, **CLASSIFIER}, row.checkpoint,
                 *["classifier"] * own_classifier)

    # the run's generator, its masks, and its data; before images are read, what may be wrong
    G, generator = load_generator(args.run, args.device)
    settings = generator["settings"]
    args.mask = settings["mask"]
    args.mask_ratio = settings["mask_ratio"]
    if not own_classifier:
        classifier, _, _ = load_classifier(args.run, args.classifier, args.device,
                                           settings["classes"])
    more = dict(generator=generator["id"])
    unlabeled = None
    if args.extra:
        u = read_images(image_files(args.extra), settings["channels"],
                        settings["image_size"]).to(args.device)
        unlabeled = u, predict(classifier, u, len(settings["classes"])).argmax(1)
        more.update(extra=args.extra, extra_hashes=image_hashes(u).tolist())
    data = training_split(args, generator)
    args.steps = count_steps(row.checkpoint, args.steps, args.batch_size, data.n)

    # the classifier under protection
    if own_classifier:
        args.classifier_steps = count_steps("classifier", args.classifier_steps,
                                            args.classifier_batch_size, data.n)
        classifier = train_classifier(args, data)
    x, y = data.held_out_images()
    accuracy = (predict(classifier, x, len(data.classes)).argmax(1) == y).float().mean()
    print(f"classifier: held-out accuracy {accuracy:.4f}")

    # C_b, the scorer
    run = train_scorer(args, row, G, data, unlabeled, **more)
    print(f"C_b: held-out AUROC {run.state['values']['val_auroc']:.3f}")
    for line in weaknesses(args, accuracy, {"generator": generator, name: run.state}):
        print("warning:", line)

# --- Below: what serves them. The method is above. -----------------------------------------------
def right_and_wrong(x_all, y_all, n, num_classes, args):
    """n random images x, masked x_m, under their labels and others: (x, x_m, y), (x, x_m, y').
    --mirror mirrors and shifts them before the mask, so that x' follows."""
    x, y = random_batch(x_all, y_all, n)
    if args.mirror:
        x = augment(x, True)
    x_m, _ = random_mask(x, args.mask_ratio, style=args.mask)
    return (x, x_m, y), (x, x_m, mismatched(y, num_classes))

def mismatched(y, num_classes):
    """y (N,) -> y' (N,), uniform over the labels that are not y (Figure 3)."""
    return (y + torch.randint(1, num_classes, y.shape).to(y.device)) % num_classes

@torch.no_grad()
def validate(C_b, G, x, y, args):
    """C_b's AUROC between right and mismatched labels on up to 1,000 of the uint8
    images x (N, C, S, S), with the same masks and labels every time."""
    from sklearn.metrics import roc_auc_score  # takes a second
    every = len(x) // 1000 + 1
    x = to_float(x[::every])
    y = y[::every]
    x_m, _ = random_mask(x, args.mask_ratio, torch.Generator().manual_seed(0), style=args.mask)
    wrong = (y + 1) % G.settings["num_classes"]
    C_b.eval()
    scores = torch.cat([C_b(x, G(x_m, label)[0], label).cpu() for label in (y, wrong)])
    C_b.train()
    right = torch.arange(len(scores)) < len(y)
    return dict(val_auroc=roc_auc_score(right, scores))

def weaknesses(args, accuracy, trained):
    """Why not to trust a detector and what to do, in lines: from the classifier's held-out accuracy
    and {"generator" or a row of SCORERS: checkpoint}."""
    lines = []
    classes = trained["generator"]["settings"]["classes"]
    chance = 1 / len(classes)
    right = f"the classifier is right on {accuracy:.1%} of the held-out images"
    if args.classifier and accuracy < 1.5 * chance:
        lines.append(f"{right}, chance is {chance:.1%}: are its classes in this order? {classes}")
    elif accuracy < (1 + chance) / 2:
        lines.append(f"{right}: " + ("does it normalise images in [-1, 1] itself?" if args.classifier
                                     else "give it more --classifier-steps"))
    elif args.classifier and accuracy > 0.99:
        lines.append(f"{right}: if they trained it, the threshold is too strict for new images; "
                     "evaluate.py --calibrate FOLDER takes some that it has not seen")
    for name, saved in trained.items():
        steps = saved["steps"]
        passes = saved["step"] * saved["settings"]["batch_size"] / saved["settings"]["n"]
        curve = [json.loads(line).get("val_auroc") for line in saved["lines"]]
        before, auroc = [1, 1, *filter(None, curve)][-2:]  # of held-out pairs
        why = ""
        if saved["step"] < steps:
            why = f"stopped at step {saved['step']} of {steps}"
        elif passes < 3:
            why = f"was trained for {passes:.1f} passes over its images"
        elif auroc < 0.6:
            why = f"hardly tells right from mismatched labels, held-out AUROC {auroc:.2f}"
        elif auroc > before + 0.01:
            why = f"still improves, held-out AUROC {before:.3f}, then {auroc:.3f}"
        if why:
            more = steps if saved["step"] < steps else 2 * steps
            command = saved["command"].replace(" --resume", "")
            lines.append(f"{name} {why}; to go on: {command} --resume --steps {more}")
    return lines

def load_generator(run, device):
    """RUN/generator.pt -> G for inference, and its checkpoint with its id. Raises OSError or
    ValueError."""
    path = Path(run, "generator.pt")
    saved = load_checkpoint(path, "generator", device)
    random_mask(torch.zeros(1, 1, 16, 16), style=saved["settings"]["mask"])  # a fork's may be missing
    G = Generator(**saved["settings"]["sizes"])
    load_weights(G, saved["generator"], path)
    saved["id"] = fingerprint(saved["generator"])
    return for_inference(G.to(device)), saved

def training_split(args, generator):
    """The images that the generator of this checkpoint was trained on; --data may say where they
    are now. Raises OSError or ValueError."""
    settings = generator["settings"]
    data = args.data or settings["data"]
    if data != settings["data"] and "digits" in (data, settings["data"]):
        raise ValueError(f"{args.run} holds {settings['data']}: name the run of {data} with --run")
    split = Split(data, "train", settings["classes"], settings["image_size"], args.device,
                  settings["channels"])
    if split.fingerprint != settings["fingerprint"]:
        raise ValueError(f"the training images of {data} are not those that {args.run} began with: "
                         "restore them, or train a generator with another --run")
    return split

# --- The classifier under protection -------------------------------------------------------------
def make_classifier(net, widths, num_classes, channels):
    """(B, channels, S, S) in [-1, 1] -> logits (B, num_classes): torchvision's ResNet-18 with the
    usual stem for 32 px (3x3, stride 1, no pooling), or a stem and two layers for each width."""
    if net == "resnet18":
        from torchvision.models import resnet18  # takes seconds; others need none
        model = resnet18(num_classes=num_classes)
        model.conv1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
        model.maxpool = nn.Identity()
        return model
    layers = [nn.Conv2d(channels, widths[0], 2), nn.GELU()]  # as Jordan's airbench: 32 px to 31
    for cin, cout in zip(widths, widths[1:]):
        layers += [
            nn.Conv2d(cin, cout, 3, padding=1, bias=False),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(cout),
            nn.GELU(),
            nn.Conv2d(cout, cout, 3, padding=1, bias=False),
            nn.BatchNorm2d(cout),
            nn.GELU()]
    layers += [nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes)]
    return nn.Sequential(*layers)

@torch.no_grad()
def whiten(weight, x):
    """Start the first convolution's weight (c, C, 2, 2) with the whitening of the 2 x 2 patches of
    images x (B, C, S, S) and with its negative, as far as c allows: Jordan's airbench (2024)."""
    patches = F.unfold(x, 2).transpose(1, 2).flatten(0, 1)  # (n, 4C)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (vectors / (values + 1e-3).sqrt()).T.flip(0)  # (4C, 4C), the largest variance first
    both = torch.cat([filters, -filters]).view(-1, *weight.shape[1:])
    weight[:len(both)] = both[:len(weight)]

def augment(x, mirror):
    """x (B, C, S, S) shifted at random by up to an eighth of the side and, if asked, mirrored."""
    B, _, S, _ = x.shape
    most = S // 8
    padded = F.pad(x, (most,) * 4, "reflect")
    down, right = torch.randint(2 * most + 1, (2, B)).tolist()
    x = torch.stack([p[:, i:i + S, j:j + S] for p, i, j in zip(padded, down, right)])
    flip = torch.rand(B, 1, 1, 1).to(x.device) >= 0.5
    return torch.where(flip & mirror, x.flip(3), x)

def train_classifier(args, data):
    """Cross-entropy on the training images; writes RUN/classifier.pt, returns the net in eval()."""
    x_all, y_all = data.training_images()
    steps = args.classifier_steps
    torch.manual_seed(args.seed)
    net = make_classifier(args.net, args.widths, len(data.classes), data.channels)
    if args.whiten and args.net == "conv":
        whiten(net[0].weight, to_float(x_all[:2000]).cpu())
    net.to(args.device, memory_format=torch.channels_last)
    opt = averaged(torch.optim.SGD(net.parameters(), args.classifier_lr, momentum=0.9,
                                   weight_decay=5e-4, nesterov=True))
    run = Run("classifier", args, [*CLASSIFIER, "mirror", "bf16", "seed"], data, steps, {},
              classifier=net, opt=opt)
    for step in range(run.step, steps):
        seed_step(args.seed, step)
        done = (step + 0.5) / steps  # the rate goes up for a quarter of them, then down to 0
        opt.param_groups[0]["lr"] = args.classifier_lr * min(done / 0.25, (1 - done) / 0.75)
        x, y = random_batch(x_all, y_all, args.classifier_batch_size)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=args.bf16):
            logits = net(augment(x, args.mirror))
        loss = F.cross_entropy(logits.float(), y, label_smoothing=args.smoothing)
        opt.zero_grad()
        loss.backward()
        opt.step()
        run.log(step, dict(loss=loss.detach()))
        run.save()
    return net.eval()

def load_classifier(run, file, device, expected=None):
    """RUN/classifier.pt, another run's or a program -> callable, images (B, C, S, S) in [-1, 1] to
    logits (B, K); its id; its class names or None. Raises OSError or ValueError, also for a
    checkpoint of other class names than `expected`, if given."""
    path = Path(file or Path(run, "classifier.pt"))
    content = path.read_bytes() if file else b"moodcat "
    if b"moodcat " not in content:  # a checkpoint says so, uncompressed
        return load_program(path, content, device), fingerprint(content), None
    saved = load_checkpoint(path, "classifier", device)
    settings = saved["settings"]
    classes = settings["classes"]
    if expected not in (None, classes):
        raise ValueError(f"{path} knows other classes: {classes}")
    if saved["step"] < saved["steps"]:
        raise ValueError(f"{path} is not trained to its end: train_scorer.py --resume")
    net = make_classifier(settings["net"], settings["widths"], len(classes), settings["channels"])
    load_weights(net, saved["classifier"], path)
    net.settings = settings
    return for_inference(net.to(device)), fingerprint(saved["classifier"]), classes

def load_program(path, content, device):
    """A torch.export or TorchScript file of this content -> a callable. Raises ValueError."""
    warnings.filterwarnings("ignore", "`torch.jit")  # it announces its retirement
    try:
        if b"archive_format" not in content and b"exported_program" not in content:
            return torch.jit.load(path, map_location=device).eval()
        from torch.export.passes import move_to_device_pass
        program = move_to_device_pass(torch.export.load(io.BytesIO(content)), device)
        first = program.graph_signature.user_inputs[0]
        [images] = [node.meta["val"] for node in program.graph.nodes if node.name == first]
        return in_batches(program.module(), images.shape[0])
    except Exception as error:  # each loader fails in its own ways
        raise ValueError(f"{path} is neither a checkpoint nor a program: write one with "
                         "torch.export, as in README") from error

def in_batches(program, n):
    """A program -> a callable for any batch, also where it is for n images at a time only."""
    def classify(x):
        padded = torch.cat([x, x[:1].expand(-len(x) % n, -1, -1, -1)])
        return torch.cat([program(part) for part in padded.split(n)])[:len(x)]
    return classify if isinstance(n, int) else program

def fingerprint(content):
    """16 hexadecimal digits that tell one program's bytes, or one net's weights, from another's."""
    if not isinstance(content, bytes):
        content = b"".join(v.cpu().numpy().tobytes() for v in content.values())
    return hashlib.sha256(content).hexdigest()[:16]

@torch.no_grad()
def predict(classifier, x, num_classes):
    """uint8 images x (N, C, S, S) -> logits (N, K). Raises ValueError where the classifier fails,
    or where what it says of an image depends on the rest of the batch."""
    try:
        logits = torch.cat([classifier(to_float(part)).float() for part in x.split(256)])
        alone = classifier(to_float(x[:1])).float()
    except Exception as error:  # a program fails in many ways
        raise ValueError(f"the classifier fails on a batch of 256 images: {error}") from error
    if logits.shape != (len(x), num_classes):
        raise ValueError(f"the classifier returns {logits.shape} for {num_classes} classes")
    if not torch.allclose(alone, logits[:1], 0.01, 0.01):
        raise ValueError("the classifier's logits depend on the batch: export it in model.eval()")
    return logits

if __name__ == "__main__":
    run_script(main)
