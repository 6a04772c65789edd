"""Train MoodCat's generator (Algorithm 1). Below the algorithm: what all the scripts share.

    python train_gen.py                                    # handwritten digits, a CPU minute
    python train_gen.py --data FOLDER --run runs/mine      # FOLDER/{train,test}/<class>/*.png
    python train_gen.py --data cifar10 --run runs/cifar10  # on a GPU the paper's width
    python train_gen.py --run runs/mine --resume           # after an interruption
    torchrun --nproc_per_node=4 -- train_gen.py ...        # one process for each of 4 GPUs

Writes RUN/generator.pt and its log RUN/generator.jsonl. Flags have their values in brackets: those
for the digits, for photographs on a CPU, on a GPU, or fewer where these agree.
"""

import argparse
import hashlib
import json
import os
import shlex
import sys
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from tqdm import tqdm

from moodcat import (MASKS, Generator, UNetDiscriminator, discriminator_loss, generator_loss,
                     kl_divergence, load_checkpoint, load_weights, random_mask, save_checkpoint,
                     write_whole)

# Each row is a flag, --lr-g 5e-4, and stands in the checkpoint and in results.json. The values: one
# for all; or for digits, for photographs; or for digits, for photographs on a CPU, on a GPU. Steps
# that have a decimal point here are passes over the training images.
SETTINGS = dict(  #                                   the paper's value; why not here
    known_classes=([*"012345"], [],                  "the other classes are OOD"),
    image_size=   (16, 32,                           "paper 32; a multiple of 8"),
    channels=     (0,                                "1 grey, 3 colour, 0 as the images are"),
    ch=           (8, 8, 32,                         "paper 32; channel multiplier"),
    batch_size=   (32, 32, 96,                       "paper 96"),
    steps=        (800, 6.0, 200.0,                  "paper: not said; 6.0 are passes"),
    lr_g=         (5e-4,                             "paper 5e-5; for minutes in place of days"),
    lr_d=         (1e-3,                             "paper 5e-5; D^Unet stays ahead of G"),
    adv=          (0.5,                              "Eq. 6: 1; the authors' code: 0.5"),
    l1=           (2.0,                              "Eq. 6: 1; the authors' code: 2"),
    l2=           (3.0,                              "Eq. 6: 1; the authors' code: 3"),
    ssim=         (5.0,                              "Eq. 6: 1; the authors' code: 5"),
    kl=           (0.1, 0.03,                        "Eq. 1: 1; the authors' code: 0.03"),
    mask=         ("rectangle",                      "a row of moodcat.MASKS"),
    mask_ratio=   ([0.1, 0.3],                       "Table 5; 0 0 masks nothing"),
    unconditional=(False,                            "Table 6: no label in the generator"),
    bf16=         (False,                            "nets in bfloat16, faster on some hardware"),
    seed=         (0,                                "of all random numbers"))

# --- Algorithm 1 ---------------------------------------------------------------------------------
def train_step(G, D, opt_g, opt_d, x, x_m, y, s):
    """Lines 2 to 5: images x, masked x_m (B, C, S, S), labels y (B,), settings s with the weights
    of Eq. 6 -> {name: loss}."""
    def forward(net, *inputs):  # in bfloat16 where asked for; the losses take float32
        with torch.autocast(x.device.type, torch.bfloat16, enabled=s.bf16):
            return [out.float() for out in net(*inputs)]

    # x' = D(E(M(x)), y), once for both updates
    x_fake, mu, logvar = forward(G, x_m, y)                            # (B, C, S, S), 2 x (B, 128)

    # (1) update E and D (Eq. 6 and Eq. 1): D^Unet only judges, its weights need no gradient
    D.requires_grad_(False)
    fake, fake_px = forward(D, x_fake, y)                              # (B,), (B, 1, S, S)
    loss_g = generator_loss(fake, fake_px, x_fake, x, s.adv, s.l1, s.l2, s.ssim)
    kl = kl_divergence(mu, logvar).mean()
    opt_g.zero_grad()
    (loss_g + s.kl * kl).backward()
    opt_g.step()

    # (2) update D^Unet on the same syntheses (Eq. 3)
    D.requires_grad_(True)
    logits, pixels = forward(D, torch.cat([x, x_fake.detach()]), torch.cat([y, y]))
    real, fake = logits.chunk(2)
    real_px, fake_px = pixels.chunk(2)
    loss_d = discriminator_loss(real, real_px, fake, fake_px)
    opt_d.zero_grad()
    loss_d.backward()
    opt_d.step()
    return dict(loss_g=loss_g.detach(), kl=kl.detach(), loss_d=loss_d.detach())

def main(argv=None):
    """Train E, D and D^Unet into RUN/generator.pt."""
    parser = Parser(__doc__, SETTINGS, mask=MASKS, channels=[0, 1, 3])
    args = parse(parser, argv, SETTINGS, "generator")
    data = Split(args.data, "train", args.known_classes, args.image_size, args.device,
                 args.channels)
    x_all, y_all = data.training_images()
    args.steps = count_steps("generator", args.steps, args.batch_size, data.n)
    print(f"{data.held_out.sum()} images held out; channels: {data.channels}")

    # the nets; G is E and D in one
    torch.manual_seed(args.seed)
    K = len(data.classes)
    G = Generator(K, args.ch, args.image_size, data.channels, conditional=not args.unconditional)
    D = UNetDiscriminator(K, args.ch, data.channels)
    opt_g = adam(G, args.lr_g, args.device)
    opt_d = adam(D, args.lr_d, args.device)
    run = Run("generator", args, SETTINGS, data, args.steps, dict(sizes=G.settings),
              generator=G, discriminator=D, opt_g=opt_g, opt_d=opt_d)

    # Algorithm 1's loop; run.step is where --resume goes on
    for step in range(run.step, args.steps):
        seed_step(args.seed, step)  # a resumed training draws what an uninterrupted one draws
        x, y = random_batch(x_all, y_all, args.batch_size)            # x in [-1, 1]
        x_m, _ = random_mask(x, args.mask_ratio, style=args.mask)     # M
        run.log(step, train_step(G, D, opt_g, opt_d, x, x_m, y, args))
        run.save()

# --- Below: what the scripts share. The method is above. -----------------------------------------
#
# --- Data: each split is one uint8 tensor (N, C, S, S); the held-out part trains nothing ---------
SUFFIXES = ".png .jpg .jpeg .bmp .gif .webp .tif .tiff .ppm .pgm".split()
TORCHVISION = "cifar10", "cifar100", "svhn", "dtd"  # it puts them into the folder data

class Split:
    """A split of a data set: images `x` uint8 (N, C, S, S), labels `y` (N,) into `classes`,
    `held_out` (N,), True where an image trains nothing (`n` do), `hashes`, `names`; `unknown`
    (M, C, S, S), images of other classes than the known ones, `unknown_names`. channels: 1, 3, or
    0, then grey images have 1. Raises OSError, ValueError."""
    def __init__(self, data, split, known=None, size=32, device="cpu", channels=0):
        self.source = data
        images, labels, all_classes = find_images(data, split)
        known = known or all_classes[:6 if data == "digits" else None]
        self.classes = [name for name in all_classes if name in known]
        if len(self.classes) < 2 or set(known) - set(self.classes):
            raise ValueError(f"known classes {known}: give two at least, of those in {data}: "
                             f"{all_classes}")
        index = {name: i for i, name in enumerate(self.classes)}
        y = torch.tensor([index.get(all_classes[label], -1) for label in labels])
        x = read_images(images, channels, size)
        names = np.array(images) if isinstance(images[0], str) else np.arange(len(images))
        is_known = y >= 0
        self.x = x[is_known].to(device)
        self.y = y[is_known].to(device)
        self.names = names[is_known]
        self.unknown = x[~is_known].to(device)
        self.unknown_names = names[~is_known]

        self.hashes = image_hashes(self.x)
        self.held_out = choose_held_out(self.hashes, y[is_known]).to(device)
        if split == "train" and self.held_out.sum() < 40:  # half of them fix one for 95%
            raise ValueError("a threshold needs 40 held-out images: add training images")
        content = str(sorted(zip(self.hashes.tolist(), self.y.tolist())))
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]
        self.channels = x.shape[1]
        self.n = int((~self.held_out).sum())

    def other(self, split, known=None, data=None):
        """Another split, of other classes or another folder, at the same size and channels."""
        _, C, S, _ = self.x.shape
        return Split(data or self.source, split, known or self.classes, S, self.x.device, C)

    def training_images(self):
        return self.x[~self.held_out], self.y[~self.held_out]

    def held_out_images(self):
        return self.x[self.held_out], self.y[self.held_out]

def to_float(x):
    """uint8 (N, C, S, S) -> float in [-1, 1]."""
    return x.float() / 127.5 - 1

def random_batch(x, y, batch_size):
    """This process's share of a random batch of uint8 images x (N, C, S, S), y (N,), as floats."""
    rows = torch.randint(len(x), (batch_size // WORLD,)).to(x.device)
    return to_float(x[rows]), y[rows]

def image_hashes(x):
    """uint8 images (N, C, S, S) -> int64 (N,), equal for equal pixels."""
    digests = [hashlib.blake2b(image.tobytes(), digest_size=8).digest()
               for image in x.cpu().numpy()]
    return torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests])

def choose_held_out(hashes, y):
    """Hashes and labels (N,) of the training images -> bool (N,), those that train nothing: of each
    class a tenth, 30 at least, half at most, of the smallest hashes, whatever order or names."""
    held_out = torch.zeros(len(y), dtype=torch.bool)
    for c in y.unique():
        of_class = hashes[y == c]
        n = min(max(30, len(of_class) // 10), len(of_class) // 2)
        held_out[y == c] = of_class < of_class.sort().values[n]
    return held_out

def find_images(data, split):
    """digits, cifar10, cifar100, svhn, dtd or a folder of train/ and test/<class>/ -> PIL images or
    file names, labels (N,), class names. Raises OSError."""
    if data == "digits":
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
        x, y = load_digits(return_X_y=True)  # 1,797 images of 8 x 8 pixels, 0 to 16; no split
        indices = train_test_split(np.arange(len(y)), test_size=1 / 3, random_state=0, stratify=y)
        rows = np.sort(indices[split == "test"])
        x = (x[rows] * 255 / 16).astype(np.uint8).reshape(-1, 8, 8)
        return [Image.fromarray(image) for image in x], y[rows], list("0123456789")
    if data in TORCHVISION:
        from torchvision import datasets
        how = dict(train=split == "train") if data.startswith("cifar") else dict(split=split)
        try:  # several processes take what is there
            pairs = getattr(datasets, data.upper())("data", download=WORLD == 1, **how)
        except (OSError, RuntimeError) as error:
            raise OSError(f"cannot download {data} into the folder data: {error}") from error
        return *zip(*pairs), getattr(pairs, "classes", [])
    classes = class_folders(Path(data, split))
    if split == "train" and classes != class_folders(Path(data, "test")):
        raise OSError(f"{data}/train and {data}/test must have folders of the same names")
    files = [(file, i) for i, name in enumerate(classes)
             for file in image_files(Path(data, split, name))]
    return *zip(*files), classes

def class_folders(path):
    """The names of the folders below a path, sorted. Raises OSError."""
    classes = sorted(folder.name for folder in path.glob("[!.]*") if folder.is_dir())
    if not classes:
        raise OSError(f"{path} does not exist, or has no folders: --data takes a folder of train/ "
                      "and test/<class>/")
    return classes

def image_files(path):
    """Names of a file or of the image files below a folder, not hidden, sorted. Raises OSError."""
    if Path(path).is_file():
        return [str(path)]
    files = sorted(str(file) for file in Path(path).rglob("*") if file.suffix.lower() in SUFFIXES
                   and "/." not in f"/{file.relative_to(path)}")
    if not files:
        raise OSError(f"{path} does not exist, or holds no images")
    return files

def read_images(images, channels, size):
    """PIL images or file names -> uint8 (N, channels, size, size), the centre of each; channels 0:
    1 where all are grey, otherwise 3. One that cannot be read raises OSError: to skip it would
    change every n."""
    def read(image):
        try:
            opened = Image.open(image) if isinstance(image, str) else image
            return fit_image(opened, channels, size)
        except Exception as error:  # damaged files fail in many ways
            raise OSError(f"{image} cannot be read: {error}") from error
    with ThreadPool() as pool:
        x = torch.from_numpy(np.stack(pool.map(read, images)))
    if channels == 0 and (x == x[:, :1]).all():
        return x[:, :1].clone()
    return x

def fit_image(image, channels, size):
    """PIL image -> uint8 (1 or 3, size, size), the centre, without alpha. Raises ValueError."""
    if image.mode[0] in "IF":
        raise ValueError(f"mode {image.mode}: save it with 8 bits a channel")
    image = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
    image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image).reshape(size, size, -1).transpose(2, 0, 1)
    return np.ascontiguousarray(pixels)  # another order in memory would round otherwise

# --- Command line --------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """The flags of all scripts, and one for each row of a table as SETTINGS; a wrong one ends in one
    line."""
    def __init__(self, doc, table={}, **choices):
        super().__init__(description=doc, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        add = self.add_argument
        add("--run", default="runs/digits", help="folder of all that is written [%(default)s]")
        add("--data", help="digits, cifar10, cifar100, or a folder of train/ and test/<class>/")
        add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
            help="[%(default)s]")
        if table:
            add("--resume", action="store_true", help="go on where the same command stopped")
            add("--anew", action="store_true", help="train anew what had other settings")
        for name, (*values, why) in table.items():
            first = values[0]
            how = dict(type=type(first), choices=choices.get(name))
            if isinstance(first, bool):
                how = dict(action=argparse.BooleanOptionalAction)
            if isinstance(first, list):
                how |= dict(nargs="+", type=type(first[0]))
            add("--" + name.replace("_", "-"), help=f"{why} {values}", **how)

    def parse_args(self, argv=None):
        args = super().parse_args(argv)
        for name, values in vars(args).items():
            name = name.replace("_", "-")
            for value in np.ravel(values).tolist():  # one value or a list of them
                if value == "":
                    self.error(f"--{name} is empty")
                # weights, ratios, the seed may be 0; counts and rates may not
                may_be_0 = name in ("seed", "channels") or type(value) is float and "lr" not in name
                if type(value) in (int, float) and not (value > 0 or value == 0 and may_be_0):
                    self.error(f"--{name} {value} is too small")
        use_device(args)
        return args

    def error(self, message):
        raise ValueError(f"{message} (--help lists the flags)")

def parse(parser, argv, table, *checkpoints):
    """The command line, with every setting of the table: one that is not given comes from the run's
    checkpoints of these names, where they are there, or else from the table. Raises ValueError."""
    given = parser.parse_args(argv)
    data = given.data or stored_settings(given.run, "generator").get("data", "digits")
    # which of a row's values: by the data and the kind of device, never by how fast it is
    column = 0 if data == "digits" else 1 if given.device == "cpu" else 2
    parser.set_defaults(data=data, **{name: values[min(column, len(values) - 1)]
                                      for name, (*values, _) in table.items()})
    stored = {}
    for name in checkpoints:
        saved = stored_settings(given.run, name)
        stored[name] = {key: saved[key] for key in saved if key in table}
        parser.set_defaults(**stored[name])
    args = parser.parse_args(argv)
    for name, settings in stored.items():  # said before the images are read
        now = {key: getattr(args, key) for key in settings}
        refuse_changes(Path(args.run, f"{name}.pt"), settings, now, args)
    return args

def stored_settings(run, name):
    """The settings in a run's checkpoint; none where it is not there."""
    path = Path(run, f"{name}.pt")
    return load_checkpoint(path, name)["settings"] if path.exists() else {}

def command_line():
    """How this program was called, to be called so again."""
    return shlex.join(["python", *sys.orig_argv[1:]])

def count_steps(name, steps, batch_size, n):
    """steps; where they are a float, passes over n images, as many as those need. Says so."""
    if isinstance(steps, float):
        steps = max(1, round(steps * n / batch_size))
    print(f"{name}: {steps} steps of {batch_size} images, {steps * batch_size / n:.1f} passes over "
          f"{n} training images")
    return steps

def refuse_changes(path, stored, now, args):
    """ValueError where settings differ from those in a checkpoint; with --anew, True. Steps may
    grow."""
    differ = []
    for name in {**stored, **now}:
        was = stored.get(name)
        value = now.get(name)
        free = name in ("data", "device", "processes", "sizes", "extra")  # another machine may go on
        if was != value and not free and not (name.endswith("steps") and was and value > was):
            differ.append(f"{name} {was!s:.60}, not {value!s:.60}")
    if differ and not args.anew:
        raise ValueError(f"{path} has {'; '.join(differ)}: --anew trains it anew, over the old")
    return bool(differ)

def use_device(args):
    """ValueError for a device that does not work; under torchrun, join its processes."""
    try:
        if WORLD > 1 and args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device!r} cannot be used here") from error
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group()  # NCCL for CUDA, otherwise Gloo

def run_script(main):
    """main() with a user's error as one line on stderr and exit status 1."""
    if RANK:
        sys.stdout = open(os.devnull, "w")
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit("error: " + " ".join(str(error).split()))
    except (MemoryError, RuntimeError) as error:
        if "memory" not in repr(error).lower():  # torch has several ways to say so
            raise
        sys.exit("error: too little memory: lower --batch-size, --image-size or the images' number")
    except KeyboardInterrupt:
        sys.exit("interrupted: --resume goes on from the last checkpoint")

# --- Training runs -------------------------------------------------------------------------------
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # torchrun's processes
RANK = int(os.environ.get("RANK", 0))
SAVE_SECONDS = 60  # between checkpoints; when they fall changes no result
LOG_EVERY = 10     # steps

def adam(net, lr, device):
    """The paper's Adam for a net, which goes to the device."""
    net.to(device, memory_format=torch.channels_last)
    return averaged(torch.optim.Adam(net.parameters(), lr, betas=(0.0, 0.999), fused=True))

def averaged(opt):
    """The optimiser; under torchrun its gradients are averaged over the processes."""
    def average(opt, *_):
        for group in opt.param_groups:
            for p in group["params"]:
                dist.all_reduce(p.grad)
                p.grad /= WORLD
    if WORLD > 1:
        opt.register_step_pre_hook(average)
    return opt

def seed_step(seed, step):
    """A step's random numbers follow from its number, in each process in another way."""
    torch.manual_seed((seed * 1_000_003 + step) * WORLD + RANK)

class Run:
    """A training into RUN/<name>.pt with its log RUN/<name>.jsonl. stateful: {name: anything with a
    state_dict}, restored where the checkpoint is there; `step` is the one to go on from. Every
    setting of the table stands in the checkpoint, and `more`. Raises ValueError, OSError."""
    def __init__(self, name, args, table, data, steps, more, **stateful):
        self.path = Path(args.run, f"{name}.pt")
        self.stateful = stateful
        settings = {k: getattr(args, k) for k in (*table, "device")}
        settings |= dict(more, data=data.source, classes=data.classes, channels=data.channels,
                         n=data.n, fingerprint=data.fingerprint, processes=WORLD)
        self.state = dict(kind=name, step=0, steps=steps, settings=settings, lines=[], values={},
                          command=command_line())
        self.ours = self.path.exists()
        saved = load_checkpoint(self.path, name, args.device) if self.ours else None
        if self.ours and not refuse_changes(self.path, saved["settings"], settings, args):
            done = f"{self.path} holds {saved['step']} of {steps} steps"
            if saved["step"] < steps and not args.resume:
                raise ValueError(f"{done}: add --resume, or delete it")
            print(done)
            if saved["steps"] < steps:
                print("a rate that falls over the steps makes it another run than one of as many")
            for key, target in stateful.items():
                load_weights(target, saved.get(key), self.path)
            self.state.update({k: saved[k] for k in ("step", "lines", "values")})
        self.step = self.state["step"]
        self.saved_at = time.time()
        self.bar = tqdm(total=steps, initial=self.step, desc=name, mininterval=1, disable=RANK)

    def log(self, step, values):
        """Keep the values of a step, every LOG_EVERY steps and at the end, and show them."""
        state = self.state
        state["step"] = step + 1
        self.bar.update()
        if state["step"] % LOG_EVERY == 0 or state["step"] == state["steps"]:
            values = {name: float(value) for name, value in values.items()}
            state["values"].update(values)
            state["lines"].append(json.dumps(dict(step=state["step"], **values)) + "\n")
            self.bar.set_postfix(state["values"], refresh=False)

    def save(self):
        """Checkpoint and log, every SAVE_SECONDS and at the end."""
        last = self.state["step"] == self.state["steps"]
        if RANK == 0 and (last or time.time() - self.saved_at > SAVE_SECONDS):
            self.write()
        if WORLD > 1 and last:
            dist.barrier()  # nobody goes on before the file is there

    def write(self):
        """Raises ValueError rather than write over another training's file, or numbers that are
        not finite."""
        if not np.isfinite(list(self.state["values"].values())).all():
            raise ValueError(f"a loss is not finite, {self.path} is as it was: lower the rate")
        if self.path.exists() and not self.ours:
            raise ValueError(f"another training has written {self.path}: use another --run")
        states = {name: target.state_dict() for name, target in self.stateful.items()}
        save_checkpoint(self.path, self.state | states)
        write_whole(self.path.with_suffix(".jsonl"), "".join(self.state["lines"]).encode())
        self.ours = True
        self.saved_at = time.time()

if __name__ == "__main__":
    run_script(main)
