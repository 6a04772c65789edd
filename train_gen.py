"""Train MoodCat's generator (Algorithm 1). Also home to what the three scripts share: the data, the
common flags and the loop that checkpoints, logs and resumes.

    python train_gen.py                                          # handwritten digits, CPU, 2 minutes
    python train_gen.py --data cifar10 --run runs/cifar10        # the paper's width, for a GPU
    python train_gen.py --data FOLDER --run runs/mine --ch 16    # FOLDER/train/<class>/*.png
    python train_gen.py --run runs/cifar10 --resume              # go on after an interruption
    torchrun --nproc_per_node=4 -- train_gen.py ...              # one process for each of 4 GPUs

Writes RUN/generator.pt, RUN/log.jsonl and sample panels RUN/samples_*.png (from the top: input,
masked, synthesis with the right label, with a wrong one).
"""

import argparse
import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps

from moodcat import (MASK_STYLES, Generator, UNetDiscriminator, discriminator_loss,
                     generator_loss, kl_divergence, load_checkpoint, random_mask, save_checkpoint)

# ---------------------------------------------------------------------------------------------
# Settings. The paper: Adam (0, 0.999), 5e-5 for all nets, batch 96, ch 32, and every term of Eq. 6
# with weight 1. The authors' code: 2 l1, 3 l2, 5 SSIM, 4 KL as a mean over the 128 dimensions.

STEPS = dict(digits=1000, colour=100_000)
BATCH = dict(digits=64, colour=96)  # 96 is the paper's
CH = dict(digits=8, colour=32)      # 32 is the paper's; 8x8-pixel digits need less
SIZE = dict(digits=16, colour=32)    # 32 is the paper's
LR_G = 5e-4        # ten times the paper's, for trainings of minutes to hours
LR_D = 1e-3        # twice the generator's: the authors have four times; keeps D ahead of G
BETAS = (0.0, 0.999)
ADV = 0.5          # image and pixel term, each: realism must not outweigh resemblance
L1, L2, SSIM = 2.0, 3.0, 5.0  # the authors' weights; in Eq. 6's 1 : 1 : 1 the syntheses stay blurred
KL = 0.1           # of the sum over z. It decides how much y matters: see the sweep in results/TABLES.md
MASK_RATIO = (0.1, 0.3)       # Table 5; one rectangle an image
SAVE_SECONDS = 60  # between checkpoints; when they fall changes no result
LOG_EVERY = 10     # steps
PANELS = 10        # sample panels in a training

# ---------------------------------------------------------------------------------------------
# Data: each split is one uint8 tensor (N, C, S, S); the fixed held-out part trains nothing

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
MIN_HELD = 40             # held-out images: half of them fix a threshold for 95%
DOWNLOADS = Path("data")  # where torchvision puts CIFAR, SVHN, DTD


def fit_image(image, channels, size):
    """PIL image of any mode and size -> uint8 (channels, size, size): the shorter side is resized,
    the centre kept; 16-bit grey is rescaled, alpha dropped."""
    if image.mode == "F":
        raise ValueError("float pixels have no fixed range: save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    image = ImageOps.exif_transpose(image).convert("RGB" if channels == 3 else "L")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)


def read_files(paths, channels, size):
    """Image files -> uint8 (N, channels, size, size). Any that cannot be read stop the run: raises
    OSError with their number and the first one's name, since a skipped image changes every n."""
    x, bad = np.empty((len(paths), channels, size, size), np.uint8), []

    def read(i):
        try:
            with Image.open(paths[i]) as image:
                x[i] = fit_image(image, channels, size)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return paths[i], error

    with ThreadPoolExecutor() as pool:
        for i in range(0, len(paths), 1024):  # so that a long list is not all in flight
            bad += filter(None, pool.map(read, range(i, min(i + 1024, len(paths)))))
    if bad:
        raise OSError(f"{len(bad)} of {len(paths)} images cannot be read, the first is {bad[0][0]} "
                      f"({bad[0][1]}): repair or remove them")
    return torch.from_numpy(x)


def image_files(folder):
    """The name of every image file below a folder (or of the file itself), sorted. Raises OSError if
    there is none."""
    folder = Path(folder)
    if not folder.exists():
        raise OSError(f"{folder} does not exist")
    files = [str(folder)] if folder.is_file() else sorted(  # a Path of each would weigh 600 bytes
        os.path.join(root, name) for root, _, names in os.walk(folder) for name in names
        if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith("."))
    if not files:
        raise OSError(f"{folder} holds no images ({' '.join(sorted(SUFFIXES))})")
    return files


def read_split(data, split, size):
    """digits, cifar10, cifar100 or a folder; split "train" or "test" -> images uint8 (N, C, S, S),
    labels (N,), class names, a name for each image. Raises OSError or ValueError."""
    if data == "digits":
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
        digits = load_digits()  # 1,797 images of 8 x 8 pixels, 0 to 16; no split of its own
        part = train_test_split(np.arange(len(digits.target)), test_size=1 / 3,
                                stratify=digits.target, random_state=0)[split == "test"]
        part.sort()
        images = [Image.fromarray((image * 255 / 16).astype(np.uint8)) for image in digits.images[part]]
        x = torch.from_numpy(np.stack([fit_image(image, 1, size) for image in images]))
        return x, torch.from_numpy(digits.target[part]), [str(n) for n in range(10)], part
    if data in ("cifar10", "cifar100"):
        from torchvision import datasets
        part = download(datasets.CIFAR10 if data == "cifar10" else datasets.CIFAR100,
                        train=split == "train")
        x = torch.from_numpy(np.stack([fit_image(Image.fromarray(a), 3, size) for a in part.data]))
        return x, torch.tensor(part.targets), part.classes, range(len(x))
    root = Path(data, split)
    if not root.is_dir():
        raise OSError(f"{root} does not exist: --data takes digits, cifar10, cifar100 or a folder "
                      "that holds train/<class>/ and test/<class>/")
    classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(classes) < 2:
        raise ValueError(f"{root} holds {len(classes)} class folder(s): two are the least")
    files = [image_files(root / name) for name in classes]
    y = torch.cat([torch.full((len(f),), i) for i, f in enumerate(files)])
    files = sum(files, [])
    return read_files(files, 3, size), y, classes, files


def download(dataset, **options):
    """A torchvision data set under ./data, fetched when it is not there, by one process of a machine.
    Raises OSError."""
    if LOCAL_RANK > 0:
        dist.barrier()
    try:
        return dataset(DOWNLOADS, download=True, **options)
    except (OSError, RuntimeError) as error:
        raise OSError(f"cannot download {dataset.__name__} ({error}): unpack it into "
                      f"{DOWNLOADS.resolve()} or go online") from error
    finally:
        if WORLD > 1 and LOCAL_RANK == 0:
            dist.barrier()


def pick_classes(names, wanted):
    """Class names or their indices -> indices, ascending. Raises ValueError."""
    picked = set()
    for want in wanted:
        if want not in names and not (want.isdigit() and int(want) < len(names)):
            raise ValueError(f"no class {want!r}: the data has {', '.join(names)}")
        picked.add(names.index(want) if want in names else int(want))
    return sorted(picked)


def held_out(y):
    """The part of the training labels (N,) that trains nothing -> bool (N,): a tenth of each class,
    30 images at least, half at most; the same for every seed and script."""
    mask = np.zeros(len(y), dtype=bool)
    for c in range(int(y.max()) + 1):
        own = np.flatnonzero(y.numpy() == c)
        n = min(max(30, len(own) // 10), len(own) // 2)
        mask[np.random.default_rng(c).permutation(own)[:n]] = True
    return torch.from_numpy(mask)


class Split:
    """The images of one split, known and unknown classes apart.

    x uint8 (N, C, S, S), y (N,) with labels 0 to K - 1 and `held`, the held-out mask, on the
    device; `unknown` uint8 (M, C, S, S): images of the other classes, or of those that
    settings["unknown"] names; `classes`, the K names; `names`, `unknown_names`, of the images.
    """

    def __init__(self, settings, split, device):
        x, y, classes, names = read_split(settings["data"], split, settings["image_size"])
        default = classes[:6] if settings["data"] == "digits" else classes
        known = pick_classes(classes, settings["known"] or default)
        if len(known) < 2:
            raise ValueError("one known class is no classification: two are the least")
        self.classes = [classes[c] for c in known]
        relabel = torch.full((len(classes),), -1)
        relabel[known] = torch.arange(len(known))
        is_known, held, names = relabel[y] >= 0, held_out(y), np.asarray(names).astype(str)
        self.x, self.y = x[is_known].to(device), relabel[y][is_known].to(device)
        self.held, self.names = held[is_known].to(device), names[is_known]
        if len(self.y.unique()) < len(known):
            raise ValueError(f"a known class has no {split} images")
        unknown = pick_classes(classes, settings.get("unknown") or
                               [n for n in classes if n not in self.classes])
        if set(unknown) & set(known):
            raise ValueError("a class cannot be both known and unknown")
        if split == "train" and self.held.sum() < MIN_HELD:
            raise ValueError(f"{int(self.held.sum())} held-out images are too few for a threshold: "
                             f"{MIN_HELD} are the least, half of the training images at most")
        is_unknown = torch.isin(y, torch.tensor(unknown, dtype=y.dtype))
        self.unknown, self.unknown_names = x[is_unknown].to(device), names[is_unknown]


def to_float(x):
    """uint8 (N, C, S, S) -> float in [-1, 1]."""
    return x.float() / 127.5 - 1


# ---------------------------------------------------------------------------------------------
# Command line

class Parser(argparse.ArgumentParser):
    """The flags that all scripts share; a wrong one ends in one line."""

    def __init__(self, doc):
        super().__init__(description=doc, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        add = self.add_argument
        add("--data", help="digits, cifar10, cifar100 or a folder with train/ and test/ [digits]")
        add("--run", default="runs/digits", help="folder of checkpoints, log, pictures [%(default)s]")
        add("--known-classes", nargs="+", metavar="CLASS",
            help="in-distribution classes; the others become the OOD set 'unknown' [digits: 0 to 5]")
        add("--image-size", type=int, help="side in pixels, a multiple of 8 [digits 16, otherwise 32]")
        add("--seed", type=int, help="[0]")
        add("--device", help="[cuda where there is one, otherwise cpu]")
        add("--batch-size", type=int, help="[digits 64, otherwise 96; in evaluate.py 256]")
        add("--bf16", action="store_true",
            help="nets in bfloat16: twice as fast where the hardware has it")

    def training(self):
        """The flags of the two training scripts."""
        length = self.add_mutually_exclusive_group()
        length.add_argument("--steps", type=int, help="stop after this many")
        length.add_argument("--minutes", type=float, help="or stop after this long")
        self.add_argument("--resume", action="store_true",
                          help="go on where RUN stopped, with its settings")
        return self

    def masking(self):
        """The flags of Tables 5 and 11."""
        self.add_argument("--mask-style", choices=MASK_STYLES, help="[random]")
        self.add_argument("--mask-ratio", nargs="+", type=float, metavar="R",
                          help="share of the area to remove, one number or a range [0.1 0.3]")
        return self

    def parse_args(self, argv=None):
        args = super().parse_args(argv)
        ratio = getattr(args, "mask_ratio", None)
        if ratio:
            if not (len(ratio) <= 2 and 0 <= ratio[0] <= ratio[-1] <= 1):
                self.error("--mask-ratio takes one number in [0, 1] or two, the smaller first")
            args.mask_ratio = [ratio[0], ratio[-1]]
        for flag, value in vars(args).items():
            if type(value) in (int, float) and not (
                    0 < value < float("inf") or value == 0 and flag in ("seed", "kl_weight")):
                self.error(f"--{flag.replace('_', '-')} must be positive")
        if args.device is None:
            args.device = "cuda" if torch.cuda.is_available() else "cpu"
        if args.device == "cuda":
            args.device = f"cuda:{LOCAL_RANK}"
        try:
            torch.empty(0, device=args.device)
        except (RuntimeError, AssertionError):
            self.error(f"there is no device {args.device!r} here")
        if args.device.startswith("cuda"):
            torch.cuda.set_device(args.device)  # NCCL and synchronize() take the current one
        if WORLD > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
        return args

    def error(self, message):
        raise ValueError(f"{message} (--help lists the flags)")


def out_of_memory(error):
    """Is a RuntimeError one of memory? That of the CPU's allocator has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def run_script(main):
    """main() with a user's error as one line on stderr and exit status 1."""
    if WORLD > 1:  # torchrun ends the others with SIGTERM when one process is gone
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(f"error: {GONE}"))
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    try:
        main()
    except MemoryError:
        sys.exit("error: the images do not fit into memory: take fewer, or a smaller --image-size")
    except RuntimeError as error:
        if out_of_memory(error):
            sys.exit(f"error: {NO_MEMORY}")
        if WORLD > 1 and any(name in str(error).lower() for name in ("gloo", "nccl")):
            sys.exit(f"error: {GONE}")
        raise
    except (ValueError, OSError) as error:
        sys.exit("error: " + " ".join(str(error).split()))
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------
# Several processes (torchrun sets these); every process holds all the data and draws the same batch

WORLD, RANK, LOCAL_RANK = (int(os.environ.get(k, d)) for k, d in (
    ("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
NO_MEMORY = "the device's memory is too small for this batch: lower --batch-size"
GONE = ("another process of this run is gone: start again, a training with --resume from its last "
        "checkpoint, which is kept")


def share(*batch):
    """This process's part of each tensor of a global batch; from here on its random numbers are its
    own. Nothing changes for one process. Raises ValueError for a batch that cannot be shared."""
    if WORLD == 1:
        return batch
    if any(len(t) % WORLD for t in batch):
        raise ValueError(f"--batch-size must be a multiple of the {WORLD} processes")
    torch.manual_seed(torch.initial_seed() + 7919 * RANK)
    return [t[RANK::WORLD] for t in batch]


def average(*nets):
    """Gradients and batch statistics become their mean over the processes."""
    if WORLD > 1:
        tensors = [p.grad for net in nets for p in net.parameters() if p.grad is not None]
        tensors += [b for net in nets for b in net.buffers() if b.is_floating_point()]
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, part in zip(tensors, (flat / WORLD).split([t.numel() for t in tensors])):
            t.copy_(part.view_as(t))


def largest(number, device):
    """The largest of the processes' numbers; returns when all have given theirs."""
    if WORLD == 1:
        return number
    number = torch.tensor(number, device=device)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def in_bf16(net, enabled):
    """net's forward, where enabled in bfloat16; float32 goes in and comes out, for the losses."""
    def forward(*inputs):
        with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=enabled):
            out = net(*inputs)
        return tuple(o.float() for o in out) if isinstance(out, tuple) else out.float()

    return forward


def kind_of(data):
    """Which column of the settings a data set takes."""
    return "digits" if data == "digits" else "colour"


def earlier(args, name):
    """The settings in RUN/<name>.pt when --resume asks for them, otherwise {}."""
    path = Path(args.run, f"{name}.pt")
    return load_checkpoint(path, name)["settings"] if args.resume and path.exists() else {}


def write_text(path, text):
    """Replace a text file at once: never half-written."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def read_log(path):
    """The lines of a log.jsonl as dictionaries, without one that a killed process left unfinished."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True)
            if line.endswith("\n")]


# ---------------------------------------------------------------------------------------------
# The loop around a training step

class Loop:
    """for step in Loop(...): a training that can stop at any moment and go on bit for bit.

    parts: {name: anything with state_dict and load_state_dict}, kept in RUN/<name>.pt with the step.
    Before each step the random numbers are seeded by (seed, step), so no RNG state is kept. A step
    reports with log(name=scalar, ...). SIGINT (Ctrl-C) and the limits end it between two steps,
    with a checkpoint. A loss or weight that is not finite raises ValueError and keeps the last
    checkpoint.
    """

    def __init__(self, args, name, settings, parts, steps, minutes=None):
        self.path, self.name = Path(args.run, f"{name}.pt"), name
        self.log_path = Path(args.run, "log.jsonl")
        self.settings, self.parts, self.steps = settings, parts, steps
        self.minutes, self.step, self.values, self.stopped = minutes, 0, {}, False
        self.device = args.device
        if self.path.exists():
            if not args.resume:
                raise ValueError(f"{self.path} exists: go on with --resume, choose another --run, or "
                                 "delete it")
            saved = load_checkpoint(self.path, name, args.device)
            if saved["settings"] != settings:
                differ = [k for k in settings if saved["settings"].get(k) != settings[k]]
                raise ValueError(f"{self.path} was trained with another {', '.join(differ)}: "
                                 "--resume needs the same flags")
            for part in parts:
                parts[part].load_state_dict(saved[part])
            self.step = saved["step"]
        elif args.resume:
            print(f"nothing to resume in {self.path}: starting from step 0")
        if RANK == 0:  # it alone writes
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for unfinished in self.path.parent.glob(f"{self.path.name}*.tmp"):  # of a killed process
                unfinished.unlink()
            self._trim_log()

    def _trim_log(self):
        """Drop log lines past the checkpoint: the steps they tell of will be made again."""
        if self.log_path.exists():
            keep = [r for r in read_log(self.log_path)
                    if r["phase"] != self.name or r["step"] <= self.step]
            write_text(self.log_path, "".join(json.dumps(r) + "\n" for r in keep))

    def log(self, **values):
        """Scalars of this step, numbers or tensors."""
        self.values.update(values)

    def save(self):
        if RANK > 0:
            return
        for part in self.parts.values():
            if isinstance(part, torch.nn.Module) and not all(
                    bool(p.isfinite().all()) for p in part.parameters()):
                raise ValueError(f"weights are not finite at step {self.step}: {self.path} keeps the "
                                 "last good ones; lower the learning rate at the top of the script")
        save_checkpoint(self.path, dict(kind=self.name, step=self.step, settings=self.settings,
                                        **{k: p.state_dict() for k, p in self.parts.items()}))

    def __iter__(self):
        def stop(*_):
            self.stopped = True
            signal.signal(signal.SIGINT, before)  # a second Ctrl-C stops at once

        before = signal.signal(signal.SIGINT, stop)
        start, first, saved_at = time.time(), self.step, time.time()
        try:
            while self.step < self.steps:
                torch.manual_seed(self.settings["seed"] * 1_000_003 + self.step)
                yield self.step
                self.step += 1
                if self.step % LOG_EVERY == 0 or self.step == self.steps:
                    self._write_log()
                    self._bar(start, first)
                now = time.time()
                late = self.minutes is not None and now - start > 60 * self.minutes
                end = largest(2 if self.stopped else int(late), self.device)
                self.stopped = end == 2
                if end:
                    break
                if now - saved_at > SAVE_SECONDS:
                    self.save()
                    saved_at = now
            if self.step > first or not self.path.exists():
                self.save()
            largest(0, self.device)  # nobody goes on before the file is there
        finally:
            signal.signal(signal.SIGINT, before)
            if sys.stderr.isatty():
                print(file=sys.stderr)
        if self.stopped:
            print(f"stopped at step {self.step}; {self.path} is kept: go on with the same command "
                  "and --resume", file=sys.stderr)
            sys.exit(130)

    def _write_log(self):
        values, self.values = {k: float(v) for k, v in self.values.items()}, {}
        if not all(np.isfinite(v) for v in values.values()):
            raise ValueError(f"a loss is not finite at step {self.step}: {self.path} keeps the last "
                             "good weights; lower the learning rate at the top of the script")
        if RANK == 0:
            with open(self.log_path, "a") as file:
                file.write(json.dumps({"phase": self.name, "step": self.step, "images": self.step
                                       * self.settings["batch_size"], **values}) + "\n")
        self.shown = " ".join(f"{k} {v:.3f}" for k, v in values.items())

    def _bar(self, start, first):
        spent = time.time() - start
        rate = (self.step - first) / spent
        share = self.step / self.steps if self.steps != float("inf") else spent / 60 / self.minutes
        left = (self.steps - self.step) / rate if self.steps != float("inf") \
            else 60 * self.minutes - spent
        tty = sys.stderr.isatty()
        if RANK == 0 and (tty or self.step % (10 * LOG_EVERY) == 0 or share >= 1):
            print(f"{chr(13) if tty else ''}{self.name} {'#' * int(20 * share):20s} step {self.step} "
                  f"{rate:.1f}/s {left / 60:.1f} min left {self.shown}",
                  end="" if tty else "\n", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------
# Training (Algorithm 1)

@torch.no_grad()
def save_panel(path, G, x, x_m, y):
    """A picture of up to 12 images: input, masked, synthesis with y, with the next label."""
    from torchvision.utils import save_image
    was = G.training
    G.eval()
    rows = torch.cat([x, x_m, G(x_m, y)[0], G(x_m, (y + 1) % G.settings["num_classes"])[0]])
    save_image((rows + 1) / 2, path, nrow=len(x))
    G.train(was)


def train_step(G, D, opt_g, opt_d, x, x_m, y, kl_weight, bf16=False):
    """One iteration of Algorithm 1: images x and masked images x_m (B, C, S, S), labels y (B,); returns
    its losses."""
    synthesise, discriminate = in_bf16(G, bf16), in_bf16(D, bf16)
    x_fake, mu, logvar = synthesise(x_m, y)                       # x' = D(E(M(x)), y)

    # (1) update E and D (Eq. 6 and Eq. 1); D^Unet's weights need no gradient here
    D.requires_grad_(False)
    loss_g = generator_loss(*discriminate(x_fake, y), x_fake, x, ADV, L1, L2, SSIM)
    kl = kl_divergence(mu, logvar).mean()
    opt_g.zero_grad()
    (loss_g + kl_weight * kl).backward()
    average(G)
    opt_g.step()

    # (2) update D^Unet on the same syntheses (Eq. 3)
    D.requires_grad_(True)
    logit, pixels = discriminate(torch.cat([x, x_fake.detach()]), torch.cat([y, y]))
    (real, fake), (real_px, fake_px) = logit.chunk(2), pixels.chunk(2)
    loss_d = discriminator_loss(real, real_px, fake, fake_px)
    opt_d.zero_grad()
    loss_d.backward()
    average(D)
    opt_d.step()
    return dict(loss_g=loss_g.detach(), kl=kl.detach(), loss_d=loss_d.detach())


def build(num_classes, ch, image_size, channels, conditional, device):
    """E and D, D^Unet, and their optimisers, on the device."""
    G = Generator(num_classes, ch, image_size, channels, conditional=conditional)
    D = UNetDiscriminator(G.decoder.embed.num_embeddings, ch, channels)
    cuda = str(device).startswith("cuda")
    if WORLD > 1 and cuda:  # it refuses CPU tensors
        G = torch.nn.SyncBatchNorm.convert_sync_batchnorm(G)
    for net in (G, D):
        net.to(device, memory_format=torch.channels_last)
    return (G, D, torch.optim.Adam(G.parameters(), LR_G, BETAS, fused=cuda),
            torch.optim.Adam(D.parameters(), LR_D, BETAS, fused=cuda))


def main(argv=None):
    """Settle the settings, then train E, D and D^Unet into RUN/generator.pt."""
    parser = Parser(__doc__).training().masking()
    parser.add_argument("--ch", type=int, help="channel multiplier [digits 8, otherwise 32]")
    parser.add_argument("--kl-weight", type=float, help=f"of Eq. 1 [{KL}]")
    parser.add_argument("--unconditional", action="store_true",
                        help="no label in decoder and discriminator (Table 6)")
    args = parser.parse_args(argv)
    had = earlier(args, "generator")
    kind = kind_of(args.data or had.get("data", "digits"))
    defaults = dict(data="digits", known=None, image_size=SIZE[kind], seed=0, ch=CH[kind],
                    batch_size=BATCH[kind], kl_weight=KL, bf16=False, mask_style="random",
                    mask_ratio=list(MASK_RATIO), conditional=True)
    given = {**vars(args), "known": args.known_classes, "bf16": args.bf16 or None,
             "conditional": False if args.unconditional else None}
    settings = {k: had.get(k, default) if given[k] is None else given[k]
                for k, default in defaults.items()}
    steps = args.steps or (float("inf") if args.minutes else STEPS[kind])
    split = Split(settings, "train", args.device)
    settings.update(classes=split.classes, channels=split.x.shape[1])
    x_all, y_all = split.x[~split.held], split.y[~split.held]
    print(f"{len(x_all)} training images of {len(split.classes)} classes, {int(split.held.sum())} "
          f"held out, on {args.device}")

    torch.manual_seed(settings["seed"])
    G, D, opt_g, opt_d = build(len(split.classes), *(settings[k] for k in (
        "ch", "image_size", "channels", "conditional")), args.device)
    loop = Loop(args, "generator", settings,
                dict(generator=G, discriminator=D, opt_g=opt_g, opt_d=opt_d), steps, args.minutes)

    panel_every = 500 if steps == float("inf") else max(1, steps // PANELS)
    show = torch.cat([torch.nonzero(split.held & (split.y == c))[:2, 0]
                      for c in range(len(split.classes))])[:12]
    x_show, y_show = to_float(split.x[show]), split.y[show]
    mask = dict(ratio=settings["mask_ratio"], style=settings["mask_style"])
    masked_show, _ = random_mask(x_show, **mask, generator=torch.Generator().manual_seed(0))
    for step in loop:
        batch = torch.randint(len(x_all), (settings["batch_size"],)).to(args.device)
        x, y = to_float(x_all[batch]), y_all[batch] * settings["conditional"]  # else all 0
        x, x_m, y = share(x, random_mask(x, **mask)[0], y)
        loop.log(**train_step(G, D, opt_g, opt_d, x, x_m, y, settings["kl_weight"], settings["bf16"]))
        if RANK == 0 and (step + 1) % panel_every == 0:
            save_panel(Path(args.run, f"samples_{step + 1:06d}.png"), G, x_show, masked_show, y_show)
    print(f"{loop.path}: {loop.step} steps")


if __name__ == "__main__":
    run_script(main)
