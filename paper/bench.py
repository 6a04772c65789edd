"""Cost (Table 13) and speed of the paper's nets (ch = 32, 32 x 32 colour, 10 classes), untrained.

    python -m paper.bench --run runs/tables/bench            # writes RUN/results.json
    python -m paper.bench --device cuda --bf16 --run runs/tables/bench-gpu

Steps are the scripts' own. Their share of the best matrix multiplication counts an image as the
authors' step costs it: doing less for the same result is speed.
"""

from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import train_gen
import train_scorer
from evaluate import provenance, write_json
from moodcat import (BinaryScorer, Generator, MoodCat, UNetDiscriminator, for_inference,
                     random_mask)
from train_gen import adam

COUNTED = {"generator step": 8.1, "C_b step": 2.06, "inference": 0.749}  # GFLOP an image
INFERENCE = ((1, 1), (16, 1), (64, 1), (256, 1), (64, 2), (64, 4), (64, 8))  # batch, masks
MATRIX = 4096
SECONDS = 2  # of measurement a line
LR = 1e-5

# --- What is measured: {name: (images, parameters in millions, work())} --------------------------
def lines(device, bf16, ch=32):
    """All of it, on random images x of random labels y."""
    x = torch.rand(256, 3, 32, 32, device=device) * 2 - 1
    y = torch.arange(256, device=device) % 10
    G = for_inference(Generator(10, ch).to(device))
    C_b = for_inference(BinaryScorer(10, ch).to(device))
    found = training_lines(x[:96], y[:96], G, bf16, ch)
    params = millions(G) + millions(C_b)
    for batch, masks in INFERENCE:
        title = f"inference, batch {batch}"
        if masks > 1:
            title += f", {masks} masks"
        detector = MoodCat(G, {"cb": C_b}, masks=masks)
        found[title] = batch, params, partial(detector.score, x[:batch], y[:batch])
    return found | net_lines(x[:64], y[:64], G, C_b)

def training_lines(x, y, frozen, bf16, ch):
    """One step of each training, as the scripts take it, settings of photographs; `frozen` is the
    generator that C_b's training has."""
    settings = Namespace(bf16=bf16)
    for name in ("adv", "l1", "l2", "ssim", "kl"):
        *_, photographs, _ = train_gen.SETTINGS[name]
        setattr(settings, name, photographs)
    G = Generator(10, ch)
    D = UNetDiscriminator(10, ch)
    C_b = BinaryScorer(10, ch)
    opt_g = adam(G, LR, x.device)
    opt_d = adam(D, LR, x.device)
    opt = adam(C_b, LR, x.device)

    def generator_step():
        x_m, _ = random_mask(x)
        train_gen.train_step(G, D, opt_g, opt_d, x, x_m, y, settings)

    def c_b_step():
        x_m, _ = random_mask(x)
        right = x, x_m, y
        wrong = x, x_m, (y + 1) % 10
        train_scorer.train_step(C_b, frozen, opt, right, wrong, bf16)

    n = len(x)
    return {f"generator step, batch {n}": (n, millions(G) + millions(D), generator_step),
            f"C_b step, batch {n}": (n, millions(G) + millions(C_b), c_b_step)}

def net_lines(x, y, G, C_b):
    """A pass of each net, of VGG16 (LPIPS and DISTS) and of the classifier."""
    from torchvision.models import vgg16
    vgg = for_inference(vgg16().features.to(x.device))
    resnet = for_inference(train_scorer.make_classifier("resnet18", (), 10, 3).to(x.device))
    z = torch.randn(len(x), 128, device=x.device)
    both = torch.cat([x, x])
    work = {
        "E": (G.encoder, lambda: G.encoder(x)),
        "D": (G.decoder, lambda: G.decoder(z, y)),
        "C_b": (C_b, lambda: C_b(x, x, y)),
        "VGG16, on input and synthesis": (vgg, lambda: vgg(both)),
        "classifier: ResNet-18": (resnet, lambda: resnet(x))}
    return {name: (len(x), millions(net), call) for name, (net, call) in work.items()}

def millions(net):
    """Its parameters."""
    return sum(p.numel() for p in net.parameters()) / 1e6

# --- How -----------------------------------------------------------------------------------------
def measure(work, n):
    """A call on n images -> images/s (median), GFLOP and GMAC an image by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        work()
    gflop = counter.get_total_flops() / 1e9 / n
    timer = Timer("work()", globals=dict(work=work), num_threads=torch.get_num_threads())
    seconds = timer.blocked_autorange(min_run_time=SECONDS).median
    return dict(rate=n / seconds, gflop=gflop, macs=gflop / 2)

def main(argv=None):
    """Measure, print, write RUN/results.json."""
    parser = train_gen.Parser(__doc__)
    parser.add_argument("--bf16", action="store_true", help="nets in bfloat16")
    args = parser.parse_args(argv)
    a = torch.randn(MATRIX, MATRIX, device=args.device)
    if args.bf16:
        a = a.bfloat16()
    cost = {}
    print(" " * 34 + "M params    G MACs  images/s  share of the best matmul")
    for name, (n, params, work) in lines(args.device, args.bf16).items():
        with torch.autocast(a.device.type, torch.bfloat16, enabled=args.bf16):
            row = measure(work, n)
        row["params"] = params
        text = "{name:32s}{params:10.3f}{macs:10.4f}{rate:10.1f}".format(name=name, **row)
        counted = COUNTED.get(name.partition(",")[0])
        if counted and "masks" not in name:
            # the machine's best beside each measurement: other work slows both
            matrices = measure(lambda: a @ a, 1)
            row["peak"] = matrices["rate"] * 2 * MATRIX**3 / 1e9
            row["share"] = row["rate"] * counted / row["peak"]
            text += "  {share:.1%} of {peak:.0f} GFLOP/s".format(**row)
        cost[name] = {"an image": row}
        print(text)
    settings = dict(device=args.device, bf16=args.bf16)
    write_json(Path(args.run, "results.json"), dict(provenance(), settings=settings, cost=cost))

if __name__ == "__main__":
    train_gen.run_script(main)
