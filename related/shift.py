"""SHIFT: outliers made from training images (Kwon, Kim et al., 2023), beside MoodCat.

Erase the object from a training image, fill the hole, and train a small rejection network on the
frozen classifier's features to tell the result from the original (Figure 2).

    python -m related.shift                                    # digits, after the quickstart
    python -m related.shift --fill zero patch generator --fakes 1 2 4 8    # Table 4, Figure 3
    python -m related.shift --erase clipseg --fill diffusion   # the paper's, optional: README.md
    python -m related.shift --run runs/0123 --dev 4 5          # to choose settings: no test image

Each --erase meets each --fill; random rectangles, the control, always do. --dev: held-out images
against training images of classes that the run does not know. Writes RUN/shift.json (--dev:
shift_dev.json), fakes_<erase>_<fill>_<k>.pt, k = 0, 1, ..., and psi_<erase>_<fill>_<K>.pt.

    symbol   meaning                                              shape, range
    x, y     training image, its class                            (B, C, S, S) in [-1, 1], (B,)
    P        erase(x, y): how much a pixel belongs to the object  (B, 1, S, S) in [0, 1]
    hole     P >= lambda, grown (the paper's M = 0)               (B, 1, S, S) bool, True = removed
    x~       fill(x, hole, y): a fake, equal to x outside         (B, C, S, S) in [-1, 1]
    g        the classifier's last map, flattened                 (B, D)
    psi      rejection network on g: a logit; K fakes an image    (B,), positive = OOD
"""

import json
import math
import sys
from itertools import product
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from evaluate import baselines, format_table, gather_sets, provenance, tabulate, write_json
from moodcat import random_mask
from train_gen import Parser, Split, draw, run_script, to_float, training
from train_scorer import augment, load_classifier, load_run, mismatched, predict

# On the digits' development splits no other setting passed (results/DEVELOPMENT.md); colour untried
LAMBDA = dict(cam=0.5, random=0.5, clipseg=0.2)  # clipseg: the paper's
DILATION = 3          # pixels, odd; the code has 25 of 352
CAM_STAGE = -1        # of the classifier's maps with more than one pixel; -1 is the last
LEAST = 0.02          # a smaller object, as a share of the image, is none: no fake of that image
RATIO = (0.1, 0.5)    # area of the control's rectangles, before they grow
FAKES, STEPS = 1, dict(digits=1000, colour=7000)  # K; the paper: 1 or 8, 10 epochs
BATCH = 64            # images, and as many fakes: K changes no weight in Eq. 5
LR, MOMENTUM, DECAY = 0.01, 0.9, 5e-4   # section 5.1 and the code
MODELS = ["CIDAS/clipseg-rd64-refined", "sd2-community/stable-diffusion-2-inpainting"]  # a mirror
SIDE, DIFFUSION_STEPS, GUIDANCE = 512, 50, 7.5

# --- The frozen classifier, seen from inside -----------------------------------------------------
def maps(classifier, x):
    """Images x (B, C, S, S) -> logits (B, K) and the maps (B, c, h, w) that leave its activations
    and stages, first to last, by hooks that go again. Raises ValueError when none has space."""
    found, kinds = [], (nn.GELU, nn.ReLU, nn.Sequential)
    hooks = [part.register_forward_hook(lambda part, inputs, out: found.append(out))
             for part in classifier.children() if isinstance(part, kinds)]
    logits = classifier(x)
    for hook in hooks:
        hook.remove()
    if not any(m.ndim == 4 and m[0, 0].numel() > 1 for m in found):
        raise ValueError("SHIFT needs a classifier whose spatial features can be reached, such as "
                         "train_scorer.py's: this one, or any TorchScript program, shows none")
    return logits, [m for m in found if m.ndim == 4]

def feature(classifier, x):
    """g: x (B, C, S, S) -> (B, D), the last map before it is pooled (the paper: penultimate)."""
    return maps(classifier, x)[1][-1].flatten(1).float()

# --- Erase: (x, y) -> P; job is what main() gathers ----------------------------------------------
def layer_cam(activations, gradients):
    """Layer-CAM [17], relu(sum over c of relu(G) A): 2 x (B, c, H, W) -> (B, H, W)."""
    return F.relu((F.relu(gradients) * activations).sum(1))

def cam(job):
    """Where the classifier sees y: Layer-CAM of its logit, enlarged, from 0 to 1 (Eq. 2)."""
    def erase(x, y):
        with torch.enable_grad():
            logits, found = maps(job.net, x.detach().requires_grad_())
            A = [m for m in found if m[0, 0].numel() > 1][CAM_STAGE]
            G, = torch.autograd.grad(logits.gather(1, y[:, None]).sum(), A)
        P = F.interpolate(layer_cam(A.detach(), G)[:, None], x.shape[2:], mode="bilinear")
        low, high = P.amin((2, 3), keepdim=True), P.amax((2, 3), keepdim=True)
        return (P - low) / (high - low).clamp(min=1e-12)
    return erase

def random(job):
    """The control: a random rectangle, wherever the object is."""
    return lambda x, y: random_mask(x, RATIO)[1].float()

def clipseg(job):
    """P = CLIPSeg(x, "A photo of a [class]") (Eq. 3; the code's prompt: the class), at S."""
    processor = pretrained("transformers", "CLIPSegProcessor", job.models[0])
    net = pretrained("transformers", "CLIPSegForImageSegmentation", job.models[0]).to(job.device)
    def erase(x, y):
        texts = [f"A photo of a {job.classes[label]}" for label in y.tolist()]
        images = list(((x + 1) * 127.5).round().byte().expand(-1, 3, -1, -1).cpu())
        inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
        logits = net(**inputs.to(job.device)).logits
        P = logits.sigmoid().reshape(len(x), 1, *logits.shape[-2:])           # (B, 1, 352, 352)
        return F.interpolate(P, x.shape[2:], mode="area")                     # (B, 1, S, S)
    return erase

def holes(P, threshold, dilation):
    """P (B, 1, S, S) -> hole (B, 1, S, S) bool, P >= lambda (Eq. 3) grown by a square of `dilation`
    (odd) pixels, and (B,) bool: did it cover LEAST of the image before it grew (the code)?"""
    hole = P >= threshold
    there = hole.float().mean((1, 2, 3)) >= LEAST
    return F.max_pool2d(hole.float(), dilation, 1, dilation // 2) > 0, there

# --- Fill: (x, hole, y) -> x~ --------------------------------------------------------------------
def zero(job):
    """No filling (Table 4): no light, which is -1."""
    return lambda x, hole, y: x.masked_fill(hole, -1.0)

def patch(job):
    """The same place of a random training image of another class."""
    def fill(x, hole, y):
        other = torch.multinomial((job.y != y[:, None]).float(), 1)[:, 0]   # (B,)
        return torch.where(hole, to_float(job.x[other]), x)
    return fill

def generator(job):
    """MoodCat's synthesis from what is left and a mismatched label."""
    def fill(x, hole, y):
        x_fake, _, _ = job.G(x.masked_fill(hole, 0.0), mismatched(y, len(job.classes)))
        return torch.where(hole, x_fake, x)
    return fill

def diffusion(job):
    """LDM_inpaint (Eq. 4) of images enlarged bicubically (the code: by a second LDM), 4 a call."""
    pipe = pretrained("diffusers", "StableDiffusionInpaintPipeline", job.models[1]).to(job.device)
    pipe.safety_checker = None  # it would black images out
    pipe.set_progress_bar_config(disable=True)
    def paint(x, hole):
        large = F.interpolate(x.expand(-1, 3, -1, -1), (SIDE, SIDE), mode="bicubic").clamp(-1, 1)
        out = pipe(["A photo of background"] * len(x), image=large / 2 + 0.5, output_type="pt",
                   mask_image=F.interpolate(hole.float(), (SIDE, SIDE)),  # 1 = paint here
                   negative_prompt=[", ".join(job.classes)] * len(x), height=SIDE, width=SIDE,
                   num_inference_steps=DIFFUSION_STEPS, guidance_scale=GUIDANCE).images
        out = F.interpolate(out.to(x) * 2 - 1, x.shape[2:], mode="area")      # (B, 3, S, S)
        return torch.where(hole, out if x.shape[1] == 3 else out.mean(1, keepdim=True), x)
    return lambda x, hole, y: torch.cat([paint(*part) for part in zip(x.split(4), hole.split(4))])

ERASE = dict(cam=cam, random=random, clipseg=clipseg)
FILL = dict(zero=zero, patch=patch, generator=generator, diffusion=diffusion)
OPTIONAL = dict(clipseg="transformers", diffusion="diffusers")

def pretrained(package, kind, name):
    """package.kind of that name, a folder or a model of the Hub. Raises OSError."""
    try:
        return getattr(__import__(package), kind).from_pretrained(name)
    except Exception as error:  # downloads and damaged files fail in many ways
        raise OSError(f"no usable {name} ({error}): go online once, or name folders that hold both "
                      "after --models") from error

def make_fakes(job, settings, erase, fill, k):
    """The k-th fake of each image that has an object: uint8 (n, C, S, S). Raises ValueError."""
    store, batches = nn.Module(), torch.arange(len(job.x)).to(job.x.device).split(BATCH)
    store.register_buffer("fakes", job.x.clone())
    store.register_buffer("there", torch.zeros_like(job.y, dtype=torch.bool))
    made, parts, settings = None, dict(store=store), dict(settings, seed=1000 * job.seed + k)
    for step, log in training(job, f"fakes_{erase}_{fill}_{k}", settings, parts, len(batches)):
        made = made or (ERASE[erase](job), FILL[fill](job))  # only where fakes are missing
        rows = batches[step]
        x, y = to_float(job.x[rows]), job.y[rows]
        with torch.no_grad():
            hole, store.there[rows] = holes(made[0](x, y), LAMBDA[erase], DILATION)
            there = store.there[rows]
            if there.any():
                fake = made[1](x[there], hole[there], y[there])
                store.fakes[rows[there]] = ((fake + 1) * 127.5).round().clamp(0, 255).byte()
        log(there=there.float().mean(), hole=hole.float().mean())
    if not store.there.any():
        raise ValueError(f"--erase {erase} finds no object in any image: there is no fake")
    return store.fakes[store.there]

# --- The rejection network (section 4.2) ---------------------------------------------------------
class RejectionNetwork(nn.Module):
    """psi: features (B, D) -> logit (B,), positive = OOD as in the code, unlike the paper's."""
    def __init__(self, features, hidden=2048):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, g):
        return self.layers(g)[:, 0]

def rejection_loss(logits, is_ood):
    """Eq. 5, the mean: logits (B,), is_ood (B,), bool or 0 and 1 -> scalar."""
    return F.binary_cross_entropy_with_logits(logits, is_ood.to(logits.dtype))

def rate(done):
    """SGD's after a share `done` of the training: from LR along a cosine to 0 (the code)."""
    return LR * (1 + math.cos(math.pi * done)) / 2

def train_psi(job, name, settings, fakes):
    """psi, trained on originals and fakes, uint8 (n, C, S, S), both shifted (the code: fakes)."""
    torch.manual_seed(job.seed)
    with torch.no_grad():
        psi = RejectionNetwork(feature(job.net, to_float(fakes[:1])).shape[1]).to(job.device)
    opt = torch.optim.SGD(psi.parameters(), LR, MOMENTUM, weight_decay=DECAY, nesterov=True)
    is_ood, steps = torch.arange(2 * BATCH, device=job.device) >= BATCH, settings["steps"]
    for step, log in training(job, name, settings, dict(psi=psi, opt=opt), steps):
        opt.param_groups[0]["lr"] = rate(step / steps)
        x = torch.cat([draw(BATCH, images, images)[0] for images in (job.x, fakes)])
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=job.bf16):
            g = feature(job.net, augment(x, False))                           # (2 BATCH, D)
        loss = rejection_loss(psi(g), is_ood)
        opt.zero_grad()
        loss.backward()
        opt.step()
        log(loss=loss.detach())
    return psi.eval()

# --- Numbers -------------------------------------------------------------------------------------
@torch.no_grad()
def score(classifier, networks, x, labels, num_classes):
    """A set of uint8 images x (N, C, S, S) with labels (N,), -1 = OOD, for tabulate(): {column:
    (N,)}; the column of each of the networks {name: psi} is minus its logit."""
    parts = []
    for chunk in x.split(256):
        images, logits = to_float(chunk), predict(classifier, chunk, num_classes)
        y, g = logits.argmax(1), feature(classifier, images)
        ours = {name: -psi(g) for name, psi in networks.items()}
        parts.append(dict(ours, prediction=y, **baselines(classifier, images, logits, y)))
    columns = {k: torch.cat([part[k].cpu() for part in parts]) for k in parts[0]}
    return dict(columns, label=labels.cpu())

def rows_beside(run, n, fingerprint, classifier):
    """Rows of RUN/results.json, if of this classifier, and mood.json, if about these images."""
    table = {}
    for path in filter(Path.exists, (Path(run, "results.json"), Path(run, "mood.json"))):
        found = json.loads(path.read_text())
        images = found.get("n"), found.get("settings", {}).get("fingerprint")
        if images == (n, fingerprint) and found.get("classifier", classifier) == classifier:
            table.update(found["predicted_labels"])
        else:
            print(f"no rows of {path}: it is about other images or another classifier")
    return table

def main(argv=None):
    """Make fakes, train the networks, write and print the numbers."""
    parser = Parser(__doc__, steps="of each network [digits 1000, otherwise 7000]")
    add = parser.add_argument
    add("--erase", nargs="+", choices=ERASE, default=["cam"], help="[cam], always with random")
    add("--fill", nargs="+", choices=FILL, default=["patch"], help="[patch]")
    add("--fakes", nargs="+", type=int, metavar="K", help="fakes an image [1]")
    add("--ood", nargs="+", default=[], metavar="SET", help="as for evaluate.py")
    add("--dev", nargs="+", metavar="CLASS", help="unknown classes, two at least")
    add("--classifier", metavar="FILE", help="the program in place of RUN/classifier.pt")
    add("--models", nargs=2, default=MODELS, help="for clipseg and diffusion [%(default)s]")
    args = parser.parse_args(argv)
    G, about, split = load_run(args)
    data, classes, counts = about["settings"]["data"], split.classes, args.fakes or [FAKES]
    net, its_id, _ = load_classifier(args.run, args.classifier, args.device, classes)
    if args.dev and (set(args.dev) & set(classes) or len(args.dev) < 2 or args.ood):
        raise ValueError("--dev takes two classes or more that the run does not know, no --ood")
    if not 1 <= min(counts) <= max(counts) <= 99:
        raise ValueError("--fakes takes numbers from 1 to 99")
    try:  # what does not work is noticed before anything is made
        needed = [OPTIONAL[name] for name in (*args.erase, *args.fill) if name in OPTIONAL]
        versions = {package: __import__(package).__version__ for package in needed}
    except ImportError as error:
        raise ValueError(f"this needs pip install diffusers transformers ({error})") from error
    predict(net, split.x[:1], len(classes))
    maps(net, to_float(split.x[:1]))
    if args.dev:
        other = Split(data, "train", args.dev, split.x.shape[2], args.device).x
        sets = {"in-distribution": (split.x[split.held], split.y[split.held], None),
                "unknown": (other, torch.full((len(other),), -1), None)}
    else:
        sets = gather_sets(args, about, {})
    if len(sets) < 2:
        raise ValueError("no image is OOD: name OOD sets after --ood")
    args.x, args.y = split.x[~split.held], split.y[~split.held]
    args.G, args.net, args.classes = G, net, classes  # the job
    settings = dict(seed=args.seed, classifier=its_id, generator=about["id"],
                    fingerprint=split.fingerprint, RATIO=RATIO, LAMBDA=LAMBDA,
                    **{k: v for k, v in globals().items() if isinstance(v, (int, float))})
    steps, networks = args.steps or STEPS["digits" if data == "digits" else "colour"], {}
    for erase, fill in product(dict.fromkeys([*args.erase, "random"]), args.fill):
        own = settings | (dict(models=args.models) if {erase, fill} & OPTIONAL.keys() else {})
        fakes = [make_fakes(args, own, erase, fill, k) for k in range(max(counts))]
        for K in counts:
            title = f"SHIFT {erase}+{fill} K={K}"
            networks[title] = train_psi(args, f"psi_{erase}_{fill}_{K}", dict(
                own, steps=steps, bf16=args.bf16), torch.cat(fakes[:K]))
    scored = {k: score(net, networks, *v[:2], len(classes)) for k, v in sets.items()}
    rows = tabulate(scored, ["MSP", "ODIN", "EBO", *networks], "predicted_labels")
    n = {name: len(x) for name, (x, _, _) in sets.items()}
    settings = dict(about["settings"], shift=dict(settings, steps=steps, fakes=counts))
    results = dict(provenance(), command=" ".join(["python -m related.shift", *sys.argv[1:]]),
                   settings=settings, n=n, classifier=its_id, predicted_labels=rows)
    results["versions"].update(versions)
    write_json(Path(args.run, "shift_dev.json" if args.dev else "shift.json"), results)
    beside = {} if args.dev else rows_beside(args.run, n, split.fingerprint, its_id)
    print(f"\nPercent; images: {n}\n{format_table({**beside, **rows})}")

if __name__ == "__main__":
    run_script(main)
