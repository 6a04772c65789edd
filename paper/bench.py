"""Cost (Table 13) and speed of the paper's nets (ch = 32, 32 x 32 colour, 10 classes), untrained.

    python -m paper.bench --run runs/tables/bench            # writes RUN/results.json
    python -m paper.bench --device cuda --bf16 --run runs/tables/bench-gpu

Steps are the scripts' own. Their share of the best matrix multiplication counts an image as the
authors' step costs it: doing less for the same result is speed.
"""

from functools import partial
from pathlib import Path

import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import train_gen
import train_scorer
from evaluate import provenance, write_json
from moodcat import BinaryScorer, Generator, MoodCat, UNetDiscriminator, fold, random_mask

COUNTED = {"generator step": 8.1, "C_b step": 2.06, "inference": 0.749}  # GFLOP an image
MATRIX = 4096
SECONDS = 2  # of measurement a line

def measure(work, n):
    """A call on n images -> images/s (median), GFLOP and GMAC an image by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        work()
    timer = Timer("work()", globals=dict(work=work), num_threads=torch.get_num_threads())
    rate = n / timer.blocked_autorange(min_run_time=SECONDS).median
    return dict(rate=rate, gflop=counter.get_total_flops() / 1e9 / n,
                macs=counter.get_total_flops() / 2e9 / n)

def lines(device, bf16, ch=32):
    """What is measured: {name: (images, parameters in millions, work())}."""
    from torchvision.models import vgg16
    to = lambda net: train_gen.parallel(net, device)
    adam = lambda net: torch.optim.Adam(net.parameters(), 1e-5, train_gen.BETAS, fused=True)
    count = lambda *nets: sum(p.numel() for net in nets for p in net.parameters()) / 1e6
    x = torch.rand(256, 3, 32, 32, device=device) * 2 - 1
    y, z = torch.arange(256, device=device) % 10, torch.randn(64, 128, device=device)
    G, D, C_b = to(Generator(10, ch)), to(UNetDiscriminator(10, ch)), to(BinaryScorer(10, ch))
    frozen, scorer = fold(to(Generator(10, ch))), fold(to(BinaryScorer(10, ch)))  # as load_run()
    vgg = fold(to(vgg16().features))
    resnet = fold(to(train_scorer.make_classifier("resnet18", (), 10, 3)))
    opt_g, opt_d, opt, total = adam(G), adam(D), adam(C_b), count(G, C_b)
    right, pair = torch.arange(192, device=device) < 96, torch.cat([x[:64], x[:64]])

    def generator_step():
        x_m = random_mask(x[:96])[0]
        train_gen.train_step(G, D, opt_g, opt_d, x[:96], x_m, y[:96], 0.1, bf16)

    def c_b_step():
        images, labels = torch.cat([x[:96], x[:96]]), torch.cat([y[:96], (y[:96] + 1) % 10])
        x_m = random_mask(x[:96])[0].repeat(2, 1, 1, 1)
        train_scorer.train_step(frozen, C_b, opt, images, x_m, labels, right, bf16)

    found = {"generator step, batch 96": (96, count(G, D), generator_step),
             "C_b step, batch 96": (96, total, c_b_step)}
    for b, m in ((1, 1), (16, 1), (64, 1), (256, 1), (64, 2), (64, 4), (64, 8)):
        work = partial(MoodCat(frozen, {"cb": scorer}, masks=m).score, x[:b], y[:b])
        found[f"inference, batch {b}" + f", {m} masks" * (m > 1)] = b, total, work
    return {**found, "E": (64, count(G.encoder), lambda: frozen.encoder(x[:64])),
            "D": (64, count(G.decoder), lambda: frozen.decoder(z, y[:64])),
            "C_b": (64, count(C_b), lambda: scorer(x[:64], x[:64], y[:64])),
            "VGG16, on input and synthesis": (64, count(vgg), lambda: vgg(pair)),
            "classifier: ResNet-18": (64, count(resnet), lambda: resnet(x[:64]))}

def main(argv=None):
    """Measure, print, write RUN/results.json."""
    parser = train_gen.Parser(__doc__)
    parser.add_argument("--bf16", action="store_true", help="nets in bfloat16")
    args = parser.parse_args(argv)
    cost, a = {}, torch.randn(MATRIX, MATRIX, device=args.device)
    a = a.bfloat16() if args.bf16 else a
    print(f"{'':32s}{'M params':>10s}{'G MACs':>10s}{'images/s':>10s}  share of the best matmul")
    for name, (n, params, work) in lines(args.device, args.bf16).items():
        with torch.autocast(a.device.type, torch.bfloat16, enabled=args.bf16):
            row = dict(measure(work, n), params=params)
        counted = COUNTED.get(name.partition(",")[0]) if "masks" not in name else None
        if counted:  # the machine's best beside each measurement: other work slows both
            row["peak"] = 2 * MATRIX**3 / 1e9 * measure(lambda: a @ a, 1)["rate"]
            row["share"] = row["rate"] * counted / row["peak"]
        cost[name] = {"an image": row}
        print(f"{name:32s}{params:10.3f}{row['macs']:10.4f}{row['rate']:10.1f}  "
              + ("{share:.1%} of {peak:.0f} GFLOP/s".format(**row) if counted else ""))
    write_json(Path(args.run, "results.json"), dict(provenance(), cost=cost))

if __name__ == "__main__":
    train_gen.run_script(main)
