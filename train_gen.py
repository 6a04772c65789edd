"""Train MoodCat's generator (Algorithm 1). Home of what the scripts share: data, flags, loop.

    python train_gen.py                                        # handwritten digits, CPU, 1 minute
    python train_gen.py --data cifar10 --run runs/cifar10      # the paper's width, for a GPU
    python train_gen.py --data FOLDER --run runs/mine --ch 16  # FOLDER/{train,test}/<class>/*.png
    torchrun --nproc_per_node=4 -- train_gen.py ...            # one process for each of 4 GPUs

Writes RUN/generator.pt and its log beside it. After an interruption, add --resume.
"""

import argparse
import fcntl
import hashlib
import json
import os
import signal
import sys
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from moodcat import (WEIGHT_FILES, Generator, UNetDiscriminator, discriminator_loss,
                     generator_loss, kl_divergence, load_checkpoint, random_mask, save_checkpoint)

# Settings. The paper: Adam (0, 0.999), 5e-5 for all nets, batch 96, ch 32, and every term of Eq. 6
# with weight 1. The authors' code: 2 l1, 3 l2, 5 SSIM, 4 KL as a mean over the 128 dimensions.
PRESETS = {  # kl_weight: of the sum over z; it decides how much y matters
    "digits": dict(image_size=16, ch=8, batch_size=32, steps=800, kl_weight=0.1),
    "colour": dict(image_size=None, ch=32, batch_size=96, steps=100_000, kl_weight=0.03)}
LR_G, LR_D = 5e-4, 1e-3  # 10 and 20 times the paper's, for minutes to hours; D ahead of G
BETAS = (0.0, 0.999)
ADV = 0.5                # image and pixel term, each: realism must not outweigh resemblance
L1, L2, SSIM = 2.0, 3.0, 5.0  # the authors' weights; in Eq. 6's 1 : 1 : 1 syntheses stay blurred
MASK_RATIO = (0.1, 0.3)  # Table 5
SAVE_SECONDS = 60        # between checkpoints; when they fall changes no result
LOG_EVERY = 10           # steps
WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))  # of torchrun

# --- Data: each split is one uint8 tensor (N, C, S, S); the held-out part trains nothing ---------
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
MIN_HELD_OUT = 40         # half of them fix a threshold for 95%
DOWNLOADS = Path("data")  # where torchvision puts CIFAR, SVHN, DTD

def image_files(folder):
    """Names of a file or of the image files below a folder, not hidden, sorted. Raises OSError."""
    files = [str(folder)] if os.path.isfile(folder) else []
    for root, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        files += [os.path.join(root, n) for n in names
                  if os.path.splitext(n)[1].lower() in SUFFIXES and not n.startswith(".")]
    if not files:
        raise OSError(f"{folder} does not exist, or holds no images {' '.join(sorted(SUFFIXES))}")
    return sorted(files)

def find_images(data, split):
    """digits, cifar10, cifar100, svhn, dtd or a folder of train/ and test/<class>/ -> PIL images or
    file names, labels (N,), class names. Raises OSError."""
    if data == "digits":
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
        x, y = load_digits(return_X_y=True)  # 1,797 images of 8 x 8 pixels, 0 to 16; no split
        rows = np.sort(train_test_split(np.arange(len(y)), test_size=1 / 3, random_state=0,
                                        stratify=y)[split == "test"])
        x = (x[rows] * 255 / 16).astype(np.uint8).reshape(-1, 8, 8)
        return [Image.fromarray(a) for a in x], y[rows], list("0123456789")
    if data in ("cifar10", "cifar100", "svhn", "dtd"):
        from torchvision import datasets
        how = dict(train=split == "train") if data.startswith("cifar") else dict(split=split)
        if RANK:
            dist.barrier()  # the first process downloads
        try:
            pairs = getattr(datasets, data.upper())(DOWNLOADS, download=RANK == 0, **how)
        except (OSError, RuntimeError) as error:
            raise OSError(f"cannot download {data} into {DOWNLOADS.resolve()}: {error}") from error
        if WORLD > 1 and RANK == 0:
            dist.barrier()
        images, labels = zip(*pairs)
        return images, labels, getattr(pairs, "classes", [])
    root = Path(data, split)
    if not root.is_dir():
        raise OSError(f"{root} does not exist: --data takes a folder of train/ and test/<class>/")
    classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = [(file, y) for y, name in enumerate(classes) for file in image_files(root / name)]
    return [file for file, _ in files], [y for _, y in files], classes

def fit_image(image, channels, size):
    """PIL image -> uint8 (channels, size, size), the centre, without alpha. Raises ValueError.
    Integer grey has 8, 12 or 16 bits, the least that hold its largest value."""
    if image.mode == "F":
        raise ValueError("float pixels have no fixed range")
    if image.mode.startswith("I"):
        a = np.asarray(image).astype(np.int64).clip(0, 65535)
        full = min(n for n in (255, 4095, 65535) if n >= a.max())
        image = Image.fromarray((a * 255 // full).astype(np.uint8))
    image = ImageOps.exif_transpose(image).convert("RGB" if channels == 3 else "L")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)

def read_images(images, channels, size=None):
    """PIL images or file names -> uint8 (N, channels, size, size); size None: their own, as a
    multiple of 8 from 16 to 64. One that cannot be read raises OSError: to skip changes every n."""
    bad, x = {}, None

    def read(i):
        try:
            image = Image.open(images[i]) if isinstance(images[i], str) else images[i]
            if x is None:
                return min(image.size)
            x[i] = fit_image(image, channels, size)
        except Exception as error:  # damaged files fail in many ways; the first is reported below
            bad[i] = error

    if size is None:
        sides = [s for s in map(read, range(0, len(images), len(images) // 50 + 1)) if s]
        side = int(np.median(sides or [32]))
        size = min(max(round(side / 8) * 8, 16), 64)
        print(f"images of {side} px are taken at {size} px: --image-size changes that")
    x = np.zeros((len(images), channels, size, size), np.uint8)
    with ThreadPool() as pool:
        pool.map(read, range(len(x)))
    if bad:
        first = f"the first is {images[min(bad)]!r} ({bad[min(bad)]})"
        raise OSError(f"{len(bad)} of {len(x)} images cannot be read, {first}")
    return torch.from_numpy(x)

def image_hashes(x):
    """uint8 images (N, C, S, S) -> int64 (N,), equal for equal pixels."""
    hashes = (hashlib.blake2b(image.tobytes(), digest_size=8) for image in x.cpu().numpy())
    return torch.from_numpy(np.frombuffer(b"".join(h.digest() for h in hashes), np.int64).copy())

def held_out(hashes, y):
    """Hashes and labels (N,) of the training images -> bool (N,), those that train nothing: of each
    class a tenth, 30 at least, half at most, of the smallest hashes, whatever order or names."""
    held = torch.zeros(len(y), dtype=torch.bool)
    for c in y.unique():
        own = hashes[y == c]
        held[y == c] = own < own.sort().values[min(max(30, len(own) // 10), len(own) // 2)]
    return held

class Split:
    """A split: images x uint8 (N, C, S, S), labels y (N,), `held` (N,), True = held out; `unknown`
    (M, C, S, S), images of other classes than `classes`; `names`. Raises OSError, ValueError."""
    def __init__(self, data, split, known=None, size=None, device="cpu"):
        images, y, self.all_classes = find_images(data, split)
        known = known or self.all_classes[:6 if data == "digits" else None]
        for name in sorted(set(known) - set(self.all_classes)):
            raise ValueError(f"no class {name!r}: there are {', '.join(self.all_classes)}")
        self.classes = [name for name in self.all_classes if name in known]
        if len(self.classes) < 2:
            raise ValueError(f"{len(self.classes)} known class(es): two are the least")
        y = torch.tensor([self.classes.index(name) if name in known else -1
                          for name in self.all_classes])[torch.tensor(y)]
        x = read_images(images, 1 if data == "digits" else 3, size)
        names = np.array([im if isinstance(im, str) else str(i) for i, im in enumerate(images)])
        self.x, self.y, self.names = x[y >= 0].to(device), y[y >= 0].to(device), names[y >= 0]
        self.unknown, self.unknown_names = x[y < 0].to(device), names[y < 0]
        hashes, y = image_hashes(self.x), y[y >= 0]
        self.held = held_out(hashes, y).to(device)
        content = str(sorted(zip(hashes.tolist(), y.tolist())))
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]
        if split == "train" and self.held.sum() < MIN_HELD_OUT:
            raise ValueError(f"{self.held.sum()} held-out images, a threshold needs {MIN_HELD_OUT}")

def to_float(x):
    """uint8 (N, C, S, S) -> float in [-1, 1]."""
    return x.float() / 127.5 - 1

# --- Command line --------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """The flags of all scripts and, with steps, of the trainings; a wrong one ends in one line."""
    def __init__(self, doc, steps=None):
        super().__init__(description=doc, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        add = self.add_argument
        add("--run", default="runs/digits", help="folder of all that is written [%(default)s]")
        add("--data", help="digits, cifar10, cifar100, or a folder of train/ and test/<class>/")
        add("--seed", type=int, default=0, help="[%(default)s]")
        add("--device", default=("cpu", "cuda")[torch.cuda.is_available()], help="[%(default)s]")
        if steps:
            add("--steps", type=int, help=steps)
            add("--resume", action="store_true", help="go on where the same command stopped")
            add("--bf16", action="store_true", help="bfloat16, faster on some hardware")

    def parse_args(self, argv=None):
        args = super().parse_args(argv)
        for flag, value in vars(args).items():
            if "" in (value if isinstance(value, list) else [value]):
                self.error(f"--{flag.replace('_', '-')} is empty")
            least = 1e-9 if type(value) is float else flag != "seed"
            if type(value) in (int, float) and not value >= least:
                self.error(f"--{flag.replace('_', '-')} {value} is too small")
        try:
            if args.device == "cuda":
                args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
                torch.cuda.set_device(args.device)  # NCCL takes the current one
            torch.zeros(1, device=args.device).item()
        except (RuntimeError, AssertionError, NotImplementedError):
            self.error(f"--device {args.device!r} cannot be used here")
        if WORLD > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
        return args

    def error(self, message):
        raise ValueError(f"{message} (--help lists the flags)")

def run_script(main):
    """main() with a user's error as one line on stderr and exit status 1."""
    sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be anything
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit("error: " + " ".join(str(error).split()))
    except (MemoryError, torch.OutOfMemoryError):
        sys.exit("error: too little memory: lower --batch-size, --image-size or the images' number")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

# --- The loop around a training step, for one process or several ---------------------------------
def draw(batch_size, x, y):
    """This process's share of a random batch of uint8 images x (N, C, S, S), y (N,), as floats."""
    rows = torch.randint(len(x), (batch_size // WORLD,)).to(x.device)
    return to_float(x[rows]), y[rows]

def parallel(net, device):
    """net on the device; under torchrun, its gradients averaged over the processes."""
    net.to(device, memory_format=torch.channels_last)
    if WORLD > 1 and device.startswith("cuda"):
        net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    return DistributedDataParallel(net) if WORLD > 1 else net

def training(args, name, settings, parts, steps):
    """for step, log in training(...): the steps still to do, until RUN/<name>.pt holds them all,
    with parts, {name: anything with a state_dict}. (seed, step) seeds a step's random numbers, so
    that a resumed training equals an uninterrupted one bit for bit. log(key=scalar, ...) writes to
    RUN/<name>.jsonl. Ctrl-C ends it with a checkpoint. Raises ValueError, OSError."""
    path, first, lines, values = Path(args.run, f"{name}.pt"), 0, [], {}  # values: the last logged
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path.with_suffix(".jsonl") if RANK == 0 else os.devnull, "a")
    try:
        fcntl.flock(file, fcntl.LOCK_NB | (fcntl.LOCK_SH if RANK else fcntl.LOCK_EX))
    except BlockingIOError as error:
        raise ValueError(f"another training is at work on {path}: use another --run") from error
    if path.exists():
        saved = load_checkpoint(path, name, args.device)
        differ = ", ".join(k for k in settings if saved["settings"].get(k) != settings[k])
        if differ:
            raise ValueError(f"{path} has another {differ}: choose another --run, or delete it")
        first, lines, values = saved["step"], saved["lines"], saved["log"]
        if first < steps and not args.resume:
            raise ValueError(f"{path} stopped at step {first} of {steps}: add --resume")
        for part in parts:
            parts[part].load_state_dict(saved[part])
        print(f"{path} is there, with {first} of {steps} steps")

    nets = [part for part in parts.values() if isinstance(part, torch.nn.Module)]
    stopped = torch.zeros((), device=args.device if WORLD > 1 else "cpu")
    saved_at = time.time()
    before = signal.signal(signal.SIGINT, lambda *_: stopped.fill_(1))
    pace = 0.5 if sys.stderr.isatty() else 10  # seconds between updates of the bar
    bar = tqdm(total=steps, initial=first, desc=name, mininterval=pace, disable=RANK > 0)
    if RANK == 0:
        file.truncate(0)
    file.writelines(lines)  # without those after the checkpoint
    try:
        for step in range(first, steps):
            torch.manual_seed((settings["seed"] * 1_000_003 + step) * WORLD + RANK)
            fresh, last = {}, step == steps - 1
            yield step, fresh.update
            bar.update()
            if step % LOG_EVERY == LOG_EVERY - 1 or last:
                fresh = {k: float(v) for k, v in fresh.items()}
                values.update(fresh)
                lines.append(json.dumps(dict(step=step + 1, **fresh)) + "\n")
                file.write(lines[-1])
                file.flush()
                bar.set_postfix({k: f"{v:.3f}" for k, v in values.items()}, refresh=False)
            if WORLD > 1:
                dist.all_reduce(stopped)
            if stopped or last or time.time() - saved_at > SAVE_SECONDS:
                numbers = [*values.values(), *(p for net in nets for p in net.parameters())]
                if not all(torch.as_tensor(v).isfinite().all() for v in numbers):
                    raise ValueError(f"a loss or weight is not finite at step {step + 1}; {path} "
                                     "is as it was: lower the learning rate in the script")
                states = {k: part.state_dict() for k, part in parts.items()}
                if RANK == 0:
                    save_checkpoint(path, dict(states, kind=name, step=step + 1, steps=steps,
                                               settings=settings, lines=lines, log=values))
                saved_at = time.time()
            if stopped and not last:
                sys.exit(f"stopped at step {step + 1}; {path} is kept: repeat with --resume")
        if WORLD > 1:
            dist.barrier()  # nobody goes on before the file is there
    finally:
        signal.signal(signal.SIGINT, before)
        file.close()
        bar.close()

# --- Training (Algorithm 1) ----------------------------------------------------------------------
def train_step(G, D, opt_g, opt_d, x, x_m, y, kl_weight, bf16=False):
    """Algorithm 1's iteration: images x, masked x_m (B, C, S, S), y (B,) -> {name: loss}."""
    def run(net, *inputs):  # float32 comes out, for the losses
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            return [out.float() for out in net(*inputs)]

    # update E and D (Eq. 6 and Eq. 1); D^Unet's weights need no gradient here
    x_fake, mu, logvar = run(G, x_m, y)                           # x' = D(E(M(x)), y)
    D.requires_grad_(False)
    judged = run(getattr(D, "module", D), x_fake, y)
    loss_g = generator_loss(*judged, x_fake, x, ADV, L1, L2, SSIM)
    kl = kl_divergence(mu, logvar).mean()
    opt_g.zero_grad()
    (loss_g + kl_weight * kl).backward()
    opt_g.step()
    # update D^Unet on the same syntheses (Eq. 3)
    D.requires_grad_(True)
    logit, pixels = run(D, torch.cat([x, x_fake.detach()]), torch.cat([y, y]))
    (real, fake), (real_px, fake_px) = logit.chunk(2), pixels.chunk(2)
    loss_d = discriminator_loss(real, real_px, fake, fake_px)
    opt_d.zero_grad()
    loss_d.backward()
    opt_d.step()
    return dict(loss_g=loss_g.detach(), kl=kl.detach(), loss_d=loss_d.detach())

def main(argv=None):
    """Settle the settings, then train E, D and D^Unet into RUN/generator.pt."""
    parser = Parser(__doc__, steps="[digits 800, otherwise 100000]")
    add = parser.add_argument
    add("--known-classes", nargs="+", metavar="CLASS", help="the others are OOD [digits: 0 to 5]")
    add("--image-size", type=int, help="a multiple of 8 [digits 16, otherwise the data's own]")
    add("--ch", type=int, help="channel multiplier [digits 8, otherwise 32]")
    add("--batch-size", type=int, help="[digits 32, otherwise 96]")
    add("--kl-weight", type=float, help="[digits 0.1, otherwise 0.03]; less: x' follows y less")
    add("--unconditional", action="store_true", help="no label in the generator (Table 6)")
    args = parser.parse_args(argv)
    data = args.data or "digits"
    preset = PRESETS["digits" if data == "digits" else "colour"]
    settings = {k: getattr(args, k, None) or default for k, default in preset.items()}
    steps = settings.pop("steps")
    vgg = Path(torch.hub.get_dir(), "checkpoints", WEIGHT_FILES["vgg"])
    if data != "digits" and not vgg.exists():
        print("evaluate.py will download 528 MB for LPIPS and DISTS, or needs --scorers cb ssim")
    split = Split(data, "train", args.known_classes, settings["image_size"], args.device)
    x_all, y_all = split.x[~split.held], split.y[~split.held]
    settings.update(data=data, classes=split.classes, image_size=split.x.shape[2], seed=args.seed,
                    channels=split.x.shape[1], conditional=not args.unconditional, bf16=args.bf16,
                    mask_ratio=MASK_RATIO, fingerprint=split.fingerprint, n=len(x_all))
    print(f"{len(x_all)} training images, {len(split.x) - len(x_all)} held out, on {args.device}")
    torch.manual_seed(args.seed)
    K, ch, (_, channels, size, _) = len(split.classes), settings["ch"], split.x.shape
    nets = dict(generator=Generator(K, ch, size, channels, conditional=not args.unconditional),
                discriminator=UNetDiscriminator(K, ch, channels))
    G, D = (parallel(net, args.device) for net in nets.values())
    opt_g = torch.optim.Adam(G.parameters(), LR_G, BETAS, fused=True)
    opt_d = torch.optim.Adam(D.parameters(), LR_D, BETAS, fused=True)
    parts = dict(nets, opt_g=opt_g, opt_d=opt_d)
    for step, log in training(args, "generator", settings, parts, steps):
        x, y = draw(settings["batch_size"], x_all, y_all)
        x_m, _ = random_mask(x, MASK_RATIO)
        log(**train_step(G, D, opt_g, opt_d, x, x_m, y, settings["kl_weight"], args.bf16))

if __name__ == "__main__":
    run_script(main)
