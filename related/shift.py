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
    P        erase(job, x, y): is a pixel part of the object?     (B, 1, S, S) in [0, 1]
    hole     P >= lambda, grown (the paper's M = 0)               (B, 1, S, S) bool, True = removed
    x~       fill(job, x, hole, y): a fake, equal to x outside    (B, C, S, S) in [-1, 1]
    g        the classifier's last map, flattened                 (B, D)
    psi      rejection network on g: a logit; K fakes an image    (B,), positive = OOD
"""

import math
from functools import lru_cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from evaluate import Scored, odin, tabulate
from moodcat import concatenated, random_mask
from paper.common import add_energy
from related.common import choose_sets, report
from train_gen import Parser, Run, parse, random_batch, run_script, seed_step, to_float
from train_scorer import (augment, load_classifier, load_generator, mismatched, predict,
                          training_split)

# On the digits' development splits no other setting passed (results/DEVELOPMENT.md); those of
# photographs are untried. Each is a flag, and stands in the checkpoints and in shift.json.
FAKES = dict(
    #                 digits      photographs  what it is; the paper's value
    cam_threshold=   (0.5,        0.5,         "lambda"),
    cam_stage=       (1,          1,           "of the maps with more than a pixel, from the last"),
    rectangle=       ([0.1, 0.5], [0.1, 0.5],  "the control's area before it grows"),
    least=           (0.02,       0.02,        "share of an image that is an object; the code's"),
    dilation=        (3,          3,           "pixels, odd; the code has 25 of 352"),
    batch_size=      (64,         64,          "images; psi's, and as many fakes whatever K"),
    seed=            (0,          0,           "of all random numbers"))
PSI = dict(
    steps=           (1000,       7000,        "of each network; the paper: 10 epochs"),
    lr=              (0.01,       0.01,        "falls along a cosine; section 5.1"),
    momentum=        (0.9,        0.9,         "section 5.1"),
    weight_decay=    (5e-4,       5e-4,        "the code's"),
    bf16=            (False,      False,       "the classifier in bfloat16"))
CLIPSEG = "CIDAS/clipseg-rd64-refined"
DIFFUSION = "sd2-community/stable-diffusion-2-inpainting"  # a mirror
OPTIONAL = dict(  # those of an --erase or a --fill that needs another package
    clipseg=dict(
        clipseg_model=(CLIPSEG,   CLIPSEG,     "a folder or a model of the Hub"),
        clipseg_threshold=(0.2,   0.2,         "lambda, the paper's")),
    diffusion=dict(
        diffusion_model=(DIFFUSION, DIFFUSION, "a folder or a model of the Hub"),
        diffusion_side=(512,      512,         "pixels that it paints"),
        denoisings=  (50,         50,          "in a row"),
        guidance=    (7.5,        7.5,         "of the prompt")))
PACKAGES = dict(clipseg="transformers", diffusion="diffusers")

# --- The method: fakes, then a network that rejects them (Figure 2) ------------------------------
@torch.no_grad()
def make_fakes(job, erase, fill, k):
    """The k-th fake of each image that has an object: uint8 (n, C, S, S). Raises ValueError."""
    args = job.args
    batches = torch.arange(len(job.x), device=args.device).split(args.batch_size)
    threshold = getattr(args, f"{erase}_threshold", 0.5)  # in rectangles P is 0 or 1
    store = nn.Module()
    store.register_buffer("fakes", job.x.clone())
    store.register_buffer("there", torch.zeros_like(job.y, dtype=torch.bool))
    run = Run(f"fakes_{erase}_{fill}_{k}", args, fakes_table(erase, fill), job.data, len(batches),
              job.made_by, store=store)

    for step in range(run.step, len(batches)):
        seed_step(1000 * args.seed + k, step)
        rows = batches[step]
        x = to_float(job.x[rows])
        y = job.y[rows]
        P = ERASE[erase](job, x, y)
        hole, there = holes(P, threshold, args.dilation, args.least)
        store.there[rows] = there
        if there.any():
            fake = FILL[fill](job, x[there], hole[there], y[there])
            store.fakes[rows[there]] = ((fake + 1) * 127.5).round().clamp(0, 255).byte()
        run.log(step, dict(there=there.float().mean(), hole=hole.float().mean()))
        run.save()
    if not store.there.any():
        raise ValueError(f"--erase {erase} finds no object in any image: there is no fake")
    return store.fakes[store.there]

def train_psi(job, erase, fill, fakes, K):
    """psi, trained on originals and fakes, K an image, uint8 (n, C, S, S), both shifted (the code:
    fakes)."""
    args = job.args
    torch.manual_seed(args.seed)
    D = feature(job.net, to_float(fakes[:1])).shape[1]
    psi = RejectionNetwork(D).to(args.device)
    opt = torch.optim.SGD(psi.parameters(), args.lr, args.momentum,
                          weight_decay=args.weight_decay, nesterov=True)
    table = {**fakes_table(erase, fill), **PSI}
    run = Run(f"psi_{erase}_{fill}_{K}", args, table, job.data, args.steps, job.made_by, psi=psi,
              opt=opt)

    for step in range(run.step, args.steps):
        seed_step(args.seed, step)
        opt.param_groups[0]["lr"] = rate(args.lr, step / args.steps)
        originals, _ = random_batch(job.x, job.y, args.batch_size)
        some_fakes, _ = random_batch(fakes, fakes, args.batch_size)
        x = augment(torch.cat([originals, some_fakes]), False)
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=args.bf16):
            g = feature(job.net, x)                                           # (2 B, D)
        is_ood = torch.arange(len(x), device=x.device) >= len(originals)
        loss = rejection_loss(psi(g), is_ood)
        opt.zero_grad()
        loss.backward()
        opt.step()
        run.log(step, dict(loss=loss.detach()))
        run.save()
    return psi.eval()

def score(classifier, networks, x, truth, num_classes):
    """uint8 images x (N, C, S, S), the truth (N,), -1 = OOD -> Scored under C(x): the classifier's
    own scores, and of each of the networks {name: psi} minus its logit."""
    logits = predict(classifier, x, num_classes)
    scores = {"MSP": logits.log_softmax(1).amax(1), "energy": logits.logsumexp(1),
              **odin(classifier, x)}
    parts = []
    with torch.no_grad():
        for images in x.split(256):
            g = feature(classifier, to_float(images))
            parts.append({name: -psi(g) for name, psi in networks.items()})
    scores.update(concatenated(parts))
    scores = {name: values.cpu() for name, values in scores.items()}
    return Scored(truth.cpu(), logits.argmax(1).cpu(), scores)

def main(argv=None):
    """Make fakes, train the networks, write and print the numbers."""
    job, sets, settings = read_flags(argv)
    args = job.args
    networks = {}
    for erase, fill in product(dict.fromkeys([*args.erase, "random"]), args.fill):
        fakes = [make_fakes(job, erase, fill, k) for k in range(max(args.fakes))]
        for K in args.fakes:
            psi = train_psi(job, erase, fill, torch.cat(fakes[:K]), K)
            networks[f"SHIFT {erase}+{fill} K={K}"] = psi
    scored = {}
    scored_sets = dict(sets)
    if not args.dev:  # there they are the in-distribution set
        scored_sets["held-out"] = (*job.data.held_out_images(), None)
    for name, (x, truth, _) in scored_sets.items():
        scored[name, "C(x)"] = score(job.net, networks, x, truth, len(job.data.classes))
    if not args.dev:
        add_energy(scored, scored.pop(("held-out", "C(x)")).scores, networks)
    rows = tabulate(scored, "C(x)", "C(x)")
    path = Path(args.run, "shift_dev.json" if args.dev else "shift.json")
    beside = [] if args.dev else ["results.json", "mood.json"]
    report(path, settings, sets, rows, beside, classifier=job.made_by["classifier"])

# --- Below: what serves it. ----------------------------------------------------------------------
def read_flags(argv):
    """The command line, and what is to be done by it: the job, what trainings, --erase and --fill
    work with; the sets to score; settings to record. Raises OSError, ValueError."""
    table = {**FAKES, **PSI, **OPTIONAL["clipseg"], **OPTIONAL["diffusion"]}
    parser = Parser(__doc__, table)
    add = parser.add_argument
    add("--erase", nargs="+", choices=ERASE, default=["cam"], help="[cam], always with random")
    add("--fill", nargs="+", choices=FILL, default=["patch"], help="[patch]")
    add("--fakes", nargs="+", type=int, default=[1], metavar="K", help="an image [1]; 1 or 8")
    add("--ood", nargs="+", default=[], metavar="SET", help="as for evaluate.py")
    add("--dev", nargs="+", metavar="CLASS", help="unknown classes, two at least")
    add("--classifier", metavar="FILE", help="the program in place of RUN/classifier.pt")
    args = parse(parser, argv, table)
    G, saved = load_generator(args.run, args.device)
    data = training_split(args, saved)
    net, its_id, _ = load_classifier(args.run, args.classifier, args.device, data.classes)

    # what does not work is noticed before anything is made
    if args.dev and (set(args.dev) & set(data.classes) or len(args.dev) < 2 or args.ood):
        raise ValueError("--dev takes two classes or more that the run does not know, no --ood")
    if max(args.fakes) > 99:
        raise ValueError("--fakes takes numbers from 1 to 99")
    try:
        for name in {*args.erase, *args.fill} & PACKAGES.keys():
            __import__(PACKAGES[name])
    except ImportError as error:
        raise ValueError(f"this needs pip install diffusers transformers ({error})") from error
    predict(net, data.x[:1], len(data.classes))
    maps(net, to_float(data.x[:1]))
    unknown = None
    if args.dev:
        unknown = data.other("train", args.dev).x
    sets = choose_sets(args, data, unknown)

    x, y = data.training_images()
    made_by = dict(classifier=its_id, generator=saved["id"])
    job = SimpleNamespace(args=args, data=data, x=x, y=y, G=G, net=net, made_by=made_by)
    settings = dict(generator=saved["settings"], classifier=getattr(net, "settings", None),
                    shift=vars(args))
    return job, sets, settings

def fakes_table(erase, fill):
    """The settings that fakes depend on."""
    return {**FAKES, **OPTIONAL.get(erase, {}), **OPTIONAL.get(fill, {})}

# --- The frozen classifier, seen from inside -----------------------------------------------------
def maps(classifier, x):
    """Images x (B, C, S, S) -> logits (B, K) and the maps (B, c, h, w) that leave its activations
    and stages, first to last, by hooks that go again. Raises ValueError when none has space."""
    outputs = []
    hooks = []
    for part in classifier.children():
        if isinstance(part, (nn.GELU, nn.ReLU, nn.Sequential)):
            hooks.append(part.register_forward_hook(lambda *seen: outputs.append(seen[-1])))
    logits = classifier(x)
    for hook in hooks:
        hook.remove()
    found = [output for output in outputs if output.ndim == 4]
    if not with_space(found):
        raise ValueError("SHIFT needs a classifier whose spatial features can be reached, such as "
                         "train_scorer.py's: this one, or any TorchScript program, shows none")
    return logits, found

def with_space(maps):
    """Those with more than one pixel."""
    return [m for m in maps if m[0, 0].numel() > 1]

def feature(classifier, x):
    """g: x (B, C, S, S) -> (B, D), the last map before it is pooled (the paper: penultimate)."""
    _, found = maps(classifier, x)
    return found[-1].flatten(1).float()

# --- Erase: (job, x, y) -> P; job is what read_flags() gathers -----------------------------------
def layer_cam(activations, gradients):
    """Layer-CAM [17], relu(sum over c of relu(G) A): 2 x (B, c, H, W) -> (B, H, W)."""
    return F.relu((F.relu(gradients) * activations).sum(1))

def cam(job, x, y):
    """Where the classifier sees y: Layer-CAM of its logit, enlarged, from 0 to 1 (Eq. 2)."""
    with torch.enable_grad():
        logits, found = maps(job.net, x.detach().requires_grad_())
        A = with_space(found)[-job.args.cam_stage]
        G, = torch.autograd.grad(logits.gather(1, y[:, None]).sum(), A)
    P = layer_cam(A.detach(), G)[:, None]                                     # (B, 1, h, w)
    P = F.interpolate(P, x.shape[2:], mode="bilinear")                        # (B, 1, S, S)
    low = P.amin((2, 3), keepdim=True)
    high = P.amax((2, 3), keepdim=True)
    return (P - low) / (high - low).clamp(min=1e-12)

def random(job, x, y):
    """The control: a random rectangle, wherever the object is."""
    _, mask = random_mask(x, job.args.rectangle)
    return mask.float()

def clipseg(job, x, y):
    """P = CLIPSeg(x, "A photo of a [class]") (Eq. 3; the code's prompt: the class), at S."""
    name = job.args.clipseg_model
    processor = pretrained("transformers", "CLIPSegProcessor", name)
    net = pretrained("transformers", "CLIPSegForImageSegmentation", name).to(x.device)
    texts = [f"A photo of a {job.data.classes[label]}" for label in y.tolist()]
    images = ((x + 1) * 127.5).round().byte().expand(-1, 3, -1, -1).cpu()
    inputs = processor(text=texts, images=list(images), padding=True, return_tensors="pt")
    P = net(**inputs.to(x.device)).logits.sigmoid()
    P = P.reshape(len(x), 1, *P.shape[-2:])                                   # (B, 1, 352, 352)
    return F.interpolate(P, x.shape[2:], mode="area")                         # (B, 1, S, S)

def holes(P, threshold, dilation, least):
    """P (B, 1, S, S) -> hole (B, 1, S, S) bool, P >= lambda (Eq. 3) grown by a square of `dilation`
    (odd) pixels, and (B,) bool: did it cover `least` of the image before it grew (the code)?"""
    hole = P >= threshold
    there = hole.float().mean((1, 2, 3)) >= least
    return F.max_pool2d(hole.float(), dilation, 1, dilation // 2) > 0, there

# --- Fill: (job, x, hole, y) -> x~ ---------------------------------------------------------------
def zero(job, x, hole, y):
    """No filling (Table 4): no light, which is -1."""
    return x.masked_fill(hole, -1.0)

def patch(job, x, hole, y):
    """The same place of a random training image of another class."""
    other = torch.multinomial((job.y != y[:, None]).float(), 1)[:, 0]         # (B,)
    return torch.where(hole, to_float(job.x[other]), x)

def generator(job, x, hole, y):
    """MoodCat's synthesis from what is left and a mismatched label."""
    x_fake, _, _ = job.G(x.masked_fill(hole, 0.0), mismatched(y, len(job.data.classes)))
    return torch.where(hole, x_fake, x)

def diffusion(job, x, hole, y):
    """LDM_inpaint (Eq. 4) of images enlarged bicubically (the code: by a second LDM), 4 a call."""
    args = job.args
    pipe = pretrained("diffusers", "StableDiffusionInpaintPipeline", args.diffusion_model)
    pipe.to(x.device)
    pipe.safety_checker = None  # it would black images out
    pipe.set_progress_bar_config(disable=True)
    side = args.diffusion_side
    fakes = []
    for part, part_hole in zip(x.split(4), hole.split(4)):
        n = len(part)
        large = F.interpolate(part.expand(-1, 3, -1, -1), (side, side), mode="bicubic")
        fake = pipe(
            ["A photo of background"] * n,
            image=large.clamp(-1, 1) / 2 + 0.5,
            mask_image=F.interpolate(part_hole.float(), (side, side)),  # 1 = paint here
            negative_prompt=[", ".join(job.data.classes)] * n,
            height=side,
            width=side,
            num_inference_steps=args.denoisings,
            guidance_scale=args.guidance,
            output_type="pt").images
        fake = F.interpolate(fake.to(x) * 2 - 1, x.shape[2:], mode="area")    # (n, 3, S, S)
        if x.shape[1] == 1:
            fake = fake.mean(1, keepdim=True)
        fakes.append(torch.where(part_hole, fake, part))
    return torch.cat(fakes)

ERASE = dict(cam=cam, random=random, clipseg=clipseg)
FILL = dict(zero=zero, patch=patch, generator=generator, diffusion=diffusion)

@lru_cache
def pretrained(package, kind, name):
    """package.kind of that name, a folder or a model of the Hub. Raises OSError."""
    try:
        return getattr(__import__(package), kind).from_pretrained(name)
    except Exception as error:  # downloads and damaged files fail in many ways
        raise OSError(f"no usable {name} ({error}): go online once, or name folders that hold it "
                      "after --clipseg-model, --diffusion-model") from error

# --- The rejection network (section 4.2) ---------------------------------------------------------
class RejectionNetwork(nn.Module):
    """psi: features (B, D) -> logit (B,), positive = OOD as in the code, unlike the paper's."""
    def __init__(self, features, hidden=2048):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(features, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 1))

    def forward(self, g):
        return self.layers(g)[:, 0]

def rejection_loss(logits, is_ood):
    """Eq. 5, the mean: logits (B,), is_ood (B,), bool or 0 and 1 -> scalar."""
    return F.binary_cross_entropy_with_logits(logits, is_ood.to(logits.dtype))

def rate(lr, done):
    """SGD's after a share `done` of the training: from lr along a cosine to 0 (the code)."""
    return lr * (1 + math.cos(math.pi * done)) / 2

if __name__ == "__main__":
    run_script(main)
