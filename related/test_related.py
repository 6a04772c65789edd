"""python -m pytest -q related: a minute on a CPU, offline; timm, transformers, diffusers where they
are."""

import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate
import train_gen
import train_scorer
from evaluate import ood_metrics
from moodcat import Generator, log_p_values
from related import mood, shift
from train_gen import run_script, to_float

# --- MOOD ----------------------------------------------------------------------------------------
X = torch.randint(256, (40, 1, 16, 16), dtype=torch.uint8)
Y = torch.arange(40) % 2
VIEW = "y = C(x)"

def split_of(x, y, classes):
    """A training split without held-out images."""
    return SimpleNamespace(x=x, y=y, classes=classes, channels=1, n=len(x), fingerprint="none",
                           source="none",
                           training_images=lambda: (x, y))

DATA = split_of(X, Y, ["a", "b"])

def defaults(run, tables, resume=False, **changed):
    """The command line of a script with these tables of settings, for the digits."""
    args = {name: row[0] for table in tables for name, row in table.items()}
    args.update(changed, run=str(run), resume=resume, anew=False, device="cpu")
    return SimpleNamespace(**args)

def mood_arguments(run, resume=False, **changed):
    small = dict(width=16, depth=2, heads=2, codes=8, steps=4, finetune_steps=2)
    return defaults(run, [mood.MOOD, mood.FINETUNING], resume, backbone="vit", **small | changed)

def interrupted_after(calls, function):
    """The function, which at the call after so many is interrupted."""
    left = iter(range(calls))
    def wrapped(*inputs):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return function(*inputs)
    return wrapped

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = str(tmp_path_factory.mktemp("runs") / "digits")
    train_gen.main(["--run", run, "--steps", "4", "--device", "cpu"])
    train_scorer.main(["--run", run, "--steps", "4", "--classifier-steps", "10", "--device", "cpu"])
    evaluate.main(["--run", run, "--device", "cpu"])
    return run

def test_mahalanobis_check_values():
    r = np.random.default_rng(0)
    a = (r.normal(size=(20, 3)) + [2, 0, 0]).round(2)
    b = (r.normal(size=(20, 3)) + [0, 2, 0]).round(2)
    test = np.r_[r.normal(size=(4, 3)) + [2, 0, 0], r.normal(size=(4, 3)) + [0, 2, 0]].round(2)
    ood, train, y = (r.normal(size=(4, 3)) - [0, 0, 2]).round(2), np.r_[a, b], [0] * 20 + [1] * 20
    train, test, ood, y = map(torch.tensor, (train, test, ood, y))
    for kind, inside, outside, auroc in (
            ("one", [2.001342, 6.449051, 5.489222], [10.240608, 16.986313], 1),
            ("cc", [1.843921, 5.995368, 7.541964], [11.864441, 15.596295], 1),
            ("shared", [1.425362, 2.647841, 2.296357], [26.710145, 5.661791], 0.96875)):
        unit = (lambda f: f) if kind == "shared" else mood.normalise
        d = [mood.mahalanobis(unit(train), unit(f), y, kind) for f in (test, ood)]
        assert d[0].dtype == torch.float64 and d[0].shape == (8,)
        assert d[0][:3].tolist() == pytest.approx(inside, abs=1e-6), kind
        assert d[1][:2].tolist() == pytest.approx(outside, abs=1e-6), kind
        assert ood_metrics(-d[0], -d[1])["auroc"] == auroc
    own = mood.mahalanobis(mood.normalise(train), mood.normalise(train))
    assert own.mean().item() == pytest.approx(3)  # the rank

def test_mahalanobis_outside_the_span_and_bad_input():
    train = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0.6, 0.8, 0, 0]])
    test = np.array([[0.5, 0.5, 0, 0], [0.5, 0.5, 9, 0]])
    assert mood.mahalanobis(train, test).tolist() == pytest.approx([0.5, 0.5])
    for labels, kind in ((None, "cc"), (None, "shared"), ([0, 0, 0], "avg"), ([0, 1, 1], "cc")):
        with pytest.raises(ValueError, match="no distance"):
            mood.mahalanobis(train, test, labels, kind)
    assert mood.normalise(torch.zeros(1, 3)).tolist() == [[0, 0, 0]]

def test_blockwise_mask_check_values_and_never_larger_than_asked():
    mask = mood.blockwise_mask(14, 75, 16, random.Random(0))
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [0, 0, 0, 7, 6, 6, 8, 8, 8, 8, 6, 6, 6, 6]
    for grid in (14, 75, 16), (8, 24, 5), (4, 6, 1), (4, 1, 3):
        rng, count = random.Random(1), grid[1]
        sums = [int(mood.blockwise_mask(*grid, rng).sum()) for _ in range(1000)]
        assert max(sums) <= count and (count == 1 or np.mean(sums) > 0.85 * count)
        assert grid[0] < 14 or (min(sums) >= 60 and np.mean(sums) == pytest.approx(74.5, abs=0.3))

def test_losses_check_values_and_masked_patches_only():
    y, logits = torch.tensor([0]), torch.tensor([[2.0, 1, 0]])
    assert mood.smoothed_loss(logits, y).item() == pytest.approx(0.507606, abs=1e-6)
    assert mood.smoothed_loss(logits, y, 0.0).item() == pytest.approx(0.407606, abs=1e-6)
    for n, least in (10, 0.500288), (30, 0.643202):  # p is the smoothed label
        p = torch.full((1, n), 0.1 / n) + 0.9 * F.one_hot(y, n)
        assert mood.smoothed_loss(p.log(), y).item() == pytest.approx(least, abs=1e-6)
    logits = torch.zeros(2, 16, 8192, requires_grad=True)
    tokens, mask = torch.randint(8192, (2, 16)), torch.rand(2, 16) < 0.4
    (loss := mood.mim_loss(logits, tokens, mask)).backward()
    assert loss.item() == pytest.approx(math.log(8192), abs=1e-5)
    assert torch.equal(logits.grad.abs().sum(2) > 0, mask)
    elsewhere = torch.randn_like(logits) * ~mask[:, :, None]
    assert mood.mim_loss(logits + elsewhere, tokens, mask) == loss

def test_a_masked_patch_is_not_seen():
    net, x = mood.ViT(8, 16, 1, 16, 2, 2).eval(), torch.randn(2, 1, 16, 16)
    mask, other = torch.zeros(2, 16, dtype=torch.bool), x.clone()
    mask[:, 5], other[:, :, 4:8, 4:8] = True, 3.0  # patch 5 is row 1, column 1
    assert torch.allclose(net(x, mask), net(other, mask)) and net(x, mask).shape == (2, 16, 8)
    assert not torch.allclose(net(x), net(other)) and net(x).shape == (2, 8)

def test_tokens_are_the_nearest_centroids():
    grey = torch.tensor([0, 80, 160, 240])[torch.randperm(48) % 4].view(3, 1, 4, 4).byte()
    x = grey.repeat_interleave(4, 2).repeat_interleave(4, 3)  # patches of one grey each
    tokens, grey = mood.Tokenizer(x, 4)(to_float(x)).flatten(), grey.flatten()
    assert len(tokens.unique()) == len(set(zip(tokens.tolist(), grey.tolist()))) == 4

def test_rates_of_the_layers():
    net = mood.ViT(8, 16, 1, 16, 3, 2)
    groups = {id(p): g["peak"] for g in mood.layer_groups(net, 1.0, 0.5) for p in g["params"]}
    some = net.positions, net.blocks[0].norm1.weight, net.blocks[2].linear1.bias, net.norm.weight
    assert [groups[id(p)] for p in some] == [1 / 16, 1 / 8, 1 / 2, 1]
    assert len(groups) == len(list(net.parameters()))

def test_logit_scores_against_autograd():
    f, head = torch.randn(3, 5), torch.nn.Linear(5, 4)
    scores = mood.logit_scores(head(f), f)
    for i in range(3):
        p = torch.distributions.Categorical(logits=head(f[i]))
        kl = F.kl_div(p.logits, torch.full((4,), 0.25), reduction="sum")
        norm = torch.autograd.grad(kl, head.weight, retain_graph=True)[0].abs().sum()
        right = dict(GradNorm=norm, entropy=-p.entropy(), softmax=p.logits.max(),
                     energy=head(f[i]).exp().sum().log())
        assert {k: v[i].item() for k, v in scores.items()} == pytest.approx(
            {k: v.item() for k, v in right.items()}, rel=1e-5)

def test_mood_stages_are_trained_as_table_4_says(tmp_path, monkeypatch):
    loss, forward, tune = mood.mim_loss, mood.ViT.forward, mood.smoothed_loss
    calls, seen, judged, smoothed = {}, [], [], []
    class Watched(train_gen.Run):
        def __init__(self, name, args, table, data, steps, more, net, opt, **parts):
            rates = {id(p): group["peak"] for group in opt.param_groups for p in group["params"]}
            rates = {k: rates[id(p)] for k, p in net.named_parameters()}
            calls[name] = steps, rates, {k: v.clone() for k, v in net.state_dict().items()}
            super().__init__(name, args, table, data, steps, more, net=net, opt=opt, **parts)
    monkeypatch.setattr(mood, "Run", Watched)
    monkeypatch.setattr(mood, "mim_loss", lambda *a: judged.append(a[2]) or loss(*a))
    monkeypatch.setattr(mood, "smoothed_loss", lambda *a: smoothed.append(a[2]) or tune(*a))
    monkeypatch.setattr(mood.ViT, "forward", lambda net, x, mask=None: (
        seen.append(mask) or forward(net, x, mask)))
    args = mood_arguments(tmp_path, smoothing=0.2)
    stages = mood.train_stages(args, DATA)
    assert {k: v[0] for k, v in calls.items()} == dict(
        mood_pt=4, mood_ft=2, mood_ft_long=6, mood_pt_ft=2)
    lr = args.finetune_lr
    for name, low, high in (("mood_pt", args.lr, args.lr), ("mood_ft", lr, lr),
                            ("mood_ft_long", lr, lr)):
        assert {*calls[name][1].values()} == {high} == {low}, name
    rates = calls["mood_pt_ft"][1]
    assert rates["head.weight"] == lr  # the decay is over all of two blocks
    assert rates["blocks.1.norm1.weight"] == pytest.approx(lr * args.finetune_decay**0.5)
    assert rates["positions"] == pytest.approx(lr * args.finetune_decay**1.5)
    start, pt = calls["mood_pt_ft"][2], stages["pt"].state_dict()
    neither = stages["neither"].state_dict()
    for k, v in start.items():  # the pretrained body, a fresh head; ft begins at random weights
        assert torch.equal(v, neither[k] if k.startswith("head") else pt[k]), k
        assert torch.equal(calls["mood_ft"][2][k], neither[k]), k
    assert not torch.equal(pt["embed.weight"], neither["embed.weight"])
    seen = [mask for mask in seen if mask is not None]  # hidden from the net: what the loss asks
    assert len(judged) == 4 and all(map(torch.equal, seen, judged)) and all(map(torch.any, seen))
    assert smoothed == [0.2] * 10  # of 2, 6 and 2 steps
    with pytest.raises(ValueError, match="mood_ft.pt has finetune_steps 2, not 1"):  # not mood_pt
        mood.train_stages(mood_arguments(tmp_path, finetune_steps=1, smoothing=0.2), DATA)
    with pytest.raises(ValueError, match="mood_pt.pt has masked"):
        mood.train_stages(mood_arguments(tmp_path, masked=0.5, smoothing=0.2), DATA)
    longer = mood_arguments(tmp_path, resume=True, steps=5, smoothing=0.2)
    with pytest.raises(ValueError, match="mood_pt_ft.pt has pretrained"):  # by fewer steps
        mood.train_stages(longer, DATA)

def test_every_setting_of_mood_and_shift_is_a_flag_and_recorded(tmp_path, monkeypatch):
    tables = [mood.MOOD, mood.FINETUNING]
    args = mood_arguments(tmp_path)
    mood.train_stages(args, DATA)
    for name, table in (("mood_pt", mood.MOOD), ("mood_pt_ft", {**tables[0], **tables[1]})):
        settings = train_gen.load_checkpoint(tmp_path / f"{name}.pt", name)["settings"]
        assert {k: getattr(args, k) for k in table} == {k: settings[k] for k in table}
    it = job(tmp_path, steps=1, rectangle=[0.2, 0.3], cam_threshold=0.4)
    shift.train_psi(it, "random", "zero", shift.make_fakes(it, "random", "zero", 0), 1)
    for name, table in (("fakes_random_zero_0", shift.FAKES),
                        ("psi_random_zero_1", {**shift.FAKES, **shift.PSI})):
        settings = train_gen.load_checkpoint(tmp_path / f"{name}.pt", name)["settings"]
        assert {k: getattr(it.args, k) for k in table} == {k: settings[k] for k in table}
        assert settings["classifier"] == "c" and settings["generator"] == "g"
    with pytest.raises(ValueError, match="fakes_random_zero_0.pt has dilation 3, not 5"):
        shift.make_fakes(job(tmp_path, rectangle=[0.2, 0.3], cam_threshold=0.4, dilation=5),
                         "random", "zero", 0)

def test_mood_scores_are_minus_the_distances():
    torch.manual_seed(0)
    net, x, y = mood.ViT(2, 16, 1, 16, 2, 2).eval(), X, Y
    with torch.no_grad():
        f = net.features(to_float(x))
    scored = mood.score("pt+ft", net, x, y, dict(all=(x, y, None)))["all", "C(x)"]
    unit = mood.normalise(f)
    for kind, features in (("one", unit), ("cc", unit), ("shared", f)):
        want = mood.mahalanobis(features, features, y, kind)
        assert torch.allclose(scored.scores[f"MOOD pt+ft {kind}"], -want, rtol=1e-6), kind
    assert torch.equal(scored.y, net.head(f).argmax(1)) and torch.equal(scored.truth, y)
    nearest = torch.stack([mood.mahalanobis(unit[y == c], unit) for c in (0, 1)]).argmin(0)
    pt = mood.score("pt", net, x, y, dict(all=(x, y, None)))["all", "C(x)"]
    assert torch.equal(pt.y, nearest) and "MOOD pt softmax" not in pt.scores

def test_mood_resumed_is_uninterrupted_and_scores_any_batch(tmp_path, monkeypatch):
    whole = mood.train_stages(mood_arguments(tmp_path / "a"), DATA)
    monkeypatch.setattr(train_gen, "SAVE_SECONDS", -1)
    for name in ("mim_loss", "smoothed_loss"):  # one of each stage's steps is cut
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(mood, name, interrupted_after(1, getattr(mood, name)))
            mood.train_stages(mood_arguments(tmp_path / "b", resume=name != "mim_loss"), DATA)
    with pytest.raises(ValueError, match="mood_ft.pt holds 1 of 2 steps: add --resume"):
        mood.train_stages(mood_arguments(tmp_path / "b"), DATA)
    resumed = mood.train_stages(mood_arguments(tmp_path / "b", resume=True), DATA)
    for stage, net in whole.items():
        again = resumed[stage].state_dict()
        assert all(torch.equal(v, again[k]) for k, v in net.state_dict().items()), stage
    sets = dict(all=(X, Y, None), some=(X[7:8], Y[7:8], None))
    scored = mood.score("pt+ft", whole["pt+ft"], X, Y, sets)
    some = scored["some", "C(x)"].scores
    for method, values in scored["all", "C(x)"].scores.items():
        assert torch.allclose(values[7:8], some[method], rtol=1e-3), method

def test_distances_join_the_classifiers_energy(monkeypatch):
    data = train_gen.Split("digits", "train", size=16)
    held_out, unknown = data.held_out_images()[0], data.other("test").unknown
    energy = lambda x: torch.logaddexp(x.mean((1, 2, 3)), 3 * x[:, 0, 0, 0])
    classifier = lambda x: torch.cat([torch.stack([x.mean((1, 2, 3)), 3 * x[:, 0, 0, 0]], 1),
                                      torch.full((len(x), 4), -1e9)], 1)
    monkeypatch.setattr(mood, "load_classifier", lambda *_: (classifier, "its id", None))
    scored = {}
    for name, x in (("unknown", unknown), ("held-out", held_out)):
        scores = {f"MOOD pt+ft {kind}": to_float(x).std((1, 2, 3)) * i
                  for i, kind in enumerate(("one", "cc", "shared"), 1)}
        scored[name, "C(x)"] = evaluate.Scored(None, None, dict(scores, alone=torch.arange(len(x))))
    s, h = scored.values()
    args = SimpleNamespace(run="run", device="cpu")
    sets = dict(unknown=(unknown, None, None))
    assert mood.join_with_energy(args, data, scored, sets, "MOOD") == "its id"
    assert list(s.scores) == ["MOOD pt+ft one", "MOOD pt+ft cc", "MOOD pt+ft shared", "alone",
                              *(f"MOOD pt+ft {kind} with energy" for kind in ("one", "cc", "shared"))]
    for kind in ("one", "cc", "shared"):
        name = f"MOOD pt+ft {kind}"
        wanted = (log_p_values(s.scores[name], h.scores[name][::2])
                  + log_p_values(energy(to_float(unknown)), energy(to_float(held_out))[::2]))
        assert torch.allclose(s.scores[f"{name} with energy"], wanted.float(), atol=1e-4)

def test_mood_end_to_end_and_bad_input(run, capsys, monkeypatch):
    few = ["--run", run, "--device", "cpu", "--steps", "3", "--finetune-steps", "2"]
    split, drawn = train_gen.Split("digits", "train", size=16), []
    draw, make = mood.random_batch, mood.Tokenizer.__init__
    def watched(x, y, batch_size):
        drawn.append(x)
        return draw(x, y, batch_size)
    with monkeypatch.context() as patch:
        patch.setattr(mood, "random_batch", watched)
        patch.setattr(mood.Tokenizer, "__init__", lambda net, images, *more: (
            drawn.append(images) or make(net, images, *more)))
        mood.main(few)
    training = split.x[~split.held_out]
    assert len(drawn) == 1 + 3 + 2 + 5 + 2  # no held-out image trains
    assert all(torch.equal(x, training) for x in drawn)
    shown, saved = capsys.readouterr().out, json.loads(Path(run, "mood.json").read_text())
    rows = saved[VIEW]
    assert saved["settings"]["mood"]["finetune_steps"] == 2
    assert saved["settings"]["mood"].keys() >= {*mood.MOOD, *mood.FINETUNING}
    assert all(name in shown for name in ("MSP", "cb", *rows)) and saved["n"]["unknown"] == 238
    assert {"MOOD neither cc", "MOOD ft long shared", "MOOD pt one",
            "MOOD ft one", "MOOD pt+ft one", "MOOD pt+ft GradNorm",
            "MOOD pt+ft cc with energy"} <= set(rows)
    results = Path(run, "results.json")
    whole = json.loads(results.read_text())
    for change in (dict(n=dict(whole["n"], unknown=237)),
                   dict(settings=dict(generator=dict(fingerprint="0"))), dict(settings={})):
        results.write_text(json.dumps(dict(whole, **change)))
        mood.main(few)
        assert f"no rows of {results}" in (shown := capsys.readouterr().out) and "MSP" not in shown
    results.write_text(json.dumps(whole))
    mood.main([*few, "--dev", "4", "5"])
    saved = json.loads(Path(run, "dev-4-5", "mood.json").read_text())
    assert saved["settings"]["mood"]["classes"] == list("0123")
    held_out = split.y[split.held_out]
    assert saved["n"] == {"in-distribution": (held_out < 4).sum(), "unknown": (held_out > 3).sum()}
    assert "MSP" not in capsys.readouterr().out
    assert not any("with energy" in name for name in saved[VIEW])
    for words in (["--dev", "0", "1", "2", "3", "4"], ["--dev", "4", "--ood", "svhn"]):
        with pytest.raises(ValueError, match="must leave two"):
            mood.main([*few, *words])
    def short(args, generator):  # one training image of class 0
        data = training_split(args, generator)
        data.held_out |= (data.y == 0) & (torch.arange(len(data.y)) > data.y.tolist().index(0))
        return data
    training_split = mood.training_split
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="two training images"):
        patch.setattr(mood, "training_split", short)
        mood.main([*few])
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(OSError, match="pip install timm"):
        mood.main([*few, "--backbone", "timm:beit_base_patch16_224.in22k_ft_in22k"])

def test_timm_end_to_end(run, monkeypatch):
    timm = pytest.importorskip("timm")
    def tiny(name, pretrained, num_classes):
        net = timm.models.beit.Beit(img_size=28, patch_size=14, embed_dim=16, depth=2, num_heads=2,
                                    num_classes=num_classes)
        net.pretrained_cfg = dict(mean=(0.5,) * 3 if name == "tiny" else (0.485, 0.456, 0.406))
        return net
    monkeypatch.setattr(timm, "create_model", tiny)
    with pytest.raises(OSError, match="images in"):
        mood.TimmNet("of ImageNet's mean", 6)
    net, x = mood.TimmNet("tiny", 6).eval(), torch.rand(2, 3, 32, 32) * 2 - 1  # the centre's 28
    tokens = net.net.forward_features(x[..., 2:30, 2:30])
    assert torch.allclose(net.features(x), net.net.fc_norm(tokens[:, 1:].mean(1)), atol=1e-5)
    mood.main(["--run", run, "--device", "cpu", "--finetune-steps", "1", "--backbone", "timm:tiny"])
    rows = json.loads(Path(run, "mood_timm.json").read_text())[VIEW]
    assert {"timm:tiny pt one", "timm:tiny pt+ft one", "timm:tiny pt+ft softmax"} <= set(rows)

# --- SHIFT ---------------------------------------------------------------------------------------
def job(run="none", net="conv", resume=False, **changed):
    """What read_flags() gathers, with random nets for 3 classes of 16 px."""
    torch.manual_seed(0)
    x, y = torch.randint(256, (40, 1, 16, 16), dtype=torch.uint8), torch.arange(40) % 3
    net = train_scorer.make_classifier(net, [8, 16, 32, 64], 3, 1).eval().requires_grad_(False)
    G = Generator(3, 2, 16, 1).eval().requires_grad_(False)
    tables = [shift.FAKES, shift.PSI, *shift.OPTIONAL.values()]
    return SimpleNamespace(args=defaults(run, tables, resume, **changed), x=x, y=y, net=net, G=G,
                           data=split_of(x, y, ["cat", "car", "cow"]),
                           made_by=dict(classifier="c", generator="g"))

def test_shift_check_values():
    A = torch.tensor([[[[1.0, 2], [0, 3]], [[2, 0], [1, 1]]]])
    G = torch.tensor([[[[0.5, -1], [2, 1]], [[-1, 3], [1, 0]]]])
    assert shift.layer_cam(A, G).tolist() == [[[0.5, 0], [1, 3]]]
    z, is_ood = torch.tensor([-2.0, 0, 1.5, 3]).double(), torch.tensor([0, 0, 1, 1])
    assert abs(shift.rejection_loss(z, is_ood).item() - 0.267519) < 1e-6
    paper = -torch.where(is_ood == 1, 1 - torch.sigmoid(-z), torch.sigmoid(-z)).log().mean()
    assert torch.allclose(shift.rejection_loss(z, is_ood == 1), paper)
    with torch.device("meta"):
        psi = [shift.RejectionNetwork(features).parameters() for features in (8192, 73_728)]
    assert [sum(p.numel() for p in own) for own in psi] == [16_781_313, 150_999_041]
    rates = [round(shift.rate(0.01, epoch / 5), 6) for epoch in range(5)]
    assert rates == [0.01, 0.009045, 0.006545, 0.003455, 0.000955]

def test_threshold_dilation_and_images_without_an_object():
    P = torch.tensor([[[[-1.386295, -1.386293]]]]).double().sigmoid()  # 0.2 is between them
    assert shift.holes(P, 0.2, 1, 0.02)[0].flatten().tolist() == [False, True]
    P = torch.zeros(3, 1, 352, 352)
    P[0, :, 100:150, 100:160] = 1
    P.flatten(1)[1, :2478] = P.flatten(1)[2, :2479] = 1  # 2% of 352 x 352 are 2478.08
    hole, there = shift.holes(P, 0.2, 25, 0.02)
    assert hole[0].sum() == 6216 and hole[0, 0, 88:162, 88:172].all()
    assert there.tolist() == [True, False, True]
    assert not shift.holes(P * 0, 0.2, 25, 0.02)[1].any()

@pytest.mark.parametrize("name", ["conv", "resnet18"])
def test_the_cam_is_that_of_the_label_and_leaves_the_classifier_alone(name):
    it = job(net=name)
    before, x = {k: v.clone() for k, v in it.net.state_dict().items()}, to_float(it.x[:5])
    P = shift.cam(it, x, it.y[:5])
    assert P.min() >= 0 and P.max() <= 1 and (P != shift.cam(it, x, it.y[1:6])).any()
    alone = shift.cam(it, x[2:3], it.y[2:3])
    assert torch.allclose(alone, P[2:3], atol=1e-4)  # of its image alone
    logits, found = shift.maps(it.net, x)
    rest = (lambda m: it.net.fc(m.mean((2, 3)))) if name == "resnet18" else it.net[16:]
    A = [m for m in found if m[0, 0].numel() > 1][-1].requires_grad_()
    G, = torch.autograd.grad(rest(A)[torch.arange(5), it.y[:5]].sum(), A)  # from that map on
    want = F.interpolate(shift.layer_cam(A, G)[:, None], (16, 16), mode="bilinear").flatten(1)
    want = want - want.amin(1, keepdim=True)
    assert torch.allclose(P.flatten(1) * want.amax(1, keepdim=True), want, atol=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in it.net.state_dict().items())
    assert not any(m._forward_hooks for m in it.net.modules()) and torch.equal(it.net(x), logits)

@torch.no_grad()
def test_fakes_differ_inside_the_hole_alone():
    it = job()
    x, hole = to_float(it.x), shift.random_mask(to_float(it.x), 0.3)[1]
    fakes = {name: shift.FILL[name](it, x, hole, it.y) for name in ("zero", "patch", "generator")}
    for fake in fakes.values():
        assert torch.equal(fake[~hole], x[~hole]) and (fake != x)[hole].float().mean() > 0.9
    assert (fakes["zero"][hole] == -1).all() and fakes["generator"].abs().max() <= 1
    for image, inside, label in zip(fakes["patch"], hole, it.y):  # each of one other-class image
        donors = torch.stack([(d[inside] == image[inside]).all() for d in x])
        assert donors.any() and (it.y[donors] != label).all()

@torch.no_grad()
def test_the_generator_fills_under_a_mismatched_label():
    it, given = job(), []
    it.G = lambda x_m, y: given.append((x_m, y)) or (torch.zeros_like(x_m), None, None)
    x, hole = to_float(it.x), shift.random_mask(to_float(it.x), 0.3)[1]
    for _ in range(20):
        shift.generator(it, x, hole, it.y)
    assert all((y != it.y).all() and (x_m[hole] == 0).all() for x_m, y in given)
    assert len(torch.cat([y for _, y in given]).unique()) == 3

def test_psi_learns_that_fakes_are_ood_and_images_without_an_object_make_none(
        tmp_path, monkeypatch):
    it = job(tmp_path, steps=60)
    it.net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, 2), torch.nn.ReLU(), torch.nn.Flatten(),
                                 torch.nn.Linear(392, 3))
    it.x[:] = torch.randint(56, it.x.shape)  # dark
    psi = shift.train_psi(it, "cam", "zero", 200 + it.x, 1)  # against bright
    dark, bright = (psi(shift.feature(it.net, to_float(x))) for x in (it.x, 200 + it.x))
    assert (dark < 0).all() and (bright > 0).all()
    some = lambda job, x, y: (y != 0).float()[:, None, None, None] * torch.ones_like(x)
    monkeypatch.setitem(shift.ERASE, "cam", some)
    fakes = shift.make_fakes(it, "cam", "zero", 0)
    assert len(fakes) == (it.y != 0).sum() and (fakes == 0).all()

@torch.no_grad()
def test_tiny_random_clipseg_and_diffusion(tmp_path):
    transformers, diffusers = map(pytest.importorskip, ("transformers", "diffusers"))
    vocab = {chr(i) + end: 2 * i + bool(end) for i in range(33, 127) for end in ("", "</w>")}
    vocab.update({"<|startoftext|>": 0, "<|endoftext|>": 1})
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)
    tiny = dict(hidden_size=32, intermediate_size=37, num_hidden_layers=3, num_attention_heads=4)
    text = dict(tiny, vocab_size=300, projection_dim=32, bos_token_id=0, eos_token_id=1)
    net = transformers.CLIPSegForImageSegmentation(transformers.CLIPSegConfig(
        text_config=text, vision_config=dict(tiny, image_size=64, patch_size=16), reduce_dim=32,
        projection_dim=32, extract_layers=[0, 1, 2], decoder_intermediate_size=37)).eval()
    processor = transformers.CLIPSegProcessor(
        transformers.ViTImageProcessor(size=dict(height=64, width=64)), tokenizer)
    small = dict(block_out_channels=[32, 64], norm_num_groups=8)
    vae = diffusers.AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 2,
                                  up_block_types=["UpDecoderBlock2D"] * 2, **small)
    unet = diffusers.UNet2DConditionModel(
        in_channels=9, cross_attention_dim=32, down_block_types=["CrossAttnDownBlock2D"] * 2,
        up_block_types=["CrossAttnUpBlock2D"] * 2, sample_size=32, **small)
    encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(**text))
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    pipe = diffusers.StableDiffusionInpaintPipeline(vae, encoder, tokenizer, unet, scheduler, None,
                                                    None, requires_safety_checker=False)
    it = job(clipseg_model=str(tmp_path / "seg"), diffusion_model=str(tmp_path / "sd"),
             diffusion_side=64, denoisings=2)
    net.save_pretrained(it.args.clipseg_model)
    processor.save_pretrained(it.args.clipseg_model)
    pipe.save_pretrained(it.args.diffusion_model)
    x, y = to_float(it.x[:3]), it.y[:3]
    P = shift.clipseg(it, x, y)
    cow = dict(text=["A photo of a cow"], images=[it.x[2].expand(3, -1, -1)])
    want = net(**processor(**cow, return_tensors="pt")).logits.sigmoid().reshape(1, 1, 64, 64)
    assert P.shape == (3, 1, 16, 16) and torch.allclose(F.avg_pool2d(want, 4), P[2:], atol=1e-4)
    fake, hole = shift.diffusion(it, x, P >= P.median(), y), P >= P.median()
    assert torch.equal(fake[~hole], x[~hole]) and (fake != x)[hole].all() and fake.abs().max() <= 1

def test_shift_end_to_end_and_bad_input(tmp_path, monkeypatch, capsys):
    run, other = str(tmp_path / "run"), str(tmp_path / "flat.pt")
    train_gen.main(["--run", run, "--steps", "2", "--known-classes", *"0123"])
    train_scorer.main(["--run", run, "--steps", "1", "--classifier-steps", "100"])
    identity = lambda: train_scorer.load_classifier(run, None, "cpu")[1]
    before, flags = identity(), ["--run", run, "--steps", "12"]
    make_fakes, split = shift.make_fakes, train_gen.Split("digits", "train", [*"0123"], 16)
    train_psi, fakes = shift.train_psi, {}
    def watched(job, *words):
        assert torch.equal(job.x, split.x[~split.held_out])  # no held-out image trains
        return make_fakes(job, *words)
    monkeypatch.setattr(shift, "make_fakes", watched)
    monkeypatch.setattr(shift, "train_psi", lambda job, erase, fill, x, K: (
        fakes.update({f"psi_{erase}_{fill}_{K}": x}) or train_psi(job, erase, fill, x, K)))
    read = lambda name: json.loads((tmp_path / "run" / name).read_text())
    shift.main([*flags, "--fill", "zero", "generator"])
    assert identity() == before
    first = read("shift.json")[VIEW]
    settings = read("shift.json")["settings"]["shift"]
    assert settings.keys() >= {"erase", "fill", "fakes", *shift.FAKES, *shift.PSI}
    assert settings["steps"] == 12
    names = [f"SHIFT {e}+{f} K=1" for e in ("cam", "random") for f in ("zero", "generator")]
    joined = [f"{name} with energy" for name in names]
    assert list(first) == ["MSP", "energy", "ODIN", *names, *joined] and read("shift.json")["versions"]
    evaluate.main(["--run", run])
    assert read("results.json")[VIEW]["MSP"] == first["MSP"]  # and its accuracy
    shift.main([*flags, "--fill", "zero", "--fakes", "1", "2", "--dev", "4", "5"])
    dev = read("shift_dev.json")  # no test image
    assert dev["n"]["unknown"] == 242 and "SHIFT random+zero K=2" in dev[VIEW]
    one, two = fakes["psi_random_zero_1"], fakes["psi_random_zero_2"]
    assert len(two) == 2 * len(one) and torch.equal(two[:len(one)], one)
    assert not torch.equal(two[len(one):], one)  # another rectangle
    shift.main([*flags, "--fill", "zero", "--clipseg-model", "no",
                "--diffusion-model", "such"])  # play no part here
    again = read("shift.json")[VIEW]
    assert all(again[k] == first[k] for k in again) and "\ncb " in capsys.readouterr().out
    other_classifier = dict(read("results.json"), classifier="0")
    (tmp_path / "run" / "results.json").write_text(json.dumps(other_classifier))
    mood.main(["--run", run, "--steps", "3", "--finetune-steps", "2"])  # its rows with energy count
    assert f"no rows of {run}/results.json" in (shown := capsys.readouterr().out)
    assert "\ncb " not in shown and "\nSHIFT cam+zero K=1 " in shown
    shift.main([*flags, "--fill", "zero"])
    assert f"no rows of {run}/results.json" in (shown := capsys.readouterr().out)
    assert "\ncb " not in shown and "\nMOOD pt+ft one " in shown
    torch.jit.script(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 4))).save(other)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for words, line in ((["--classifier", other], "spatial features"),
                        (["--dev", "3", "4"], "two classes"), (["--dev", "4"], "two classes"),
                        (["--dev", "4", "5", "--ood", "svhn"], "no --ood"),
                        (["--fill", "diffusion"], "pip install"),
                        (["--fakes", "0"], "--fakes"), (["--fakes", "100"], "--fakes"),
                        (["--fill", "none"], "--fill"),
                        (["--fill", "zero", "--dilation", "5"], "dilation 3, not 5")):
        with pytest.raises(SystemExit) as end:
            run_script(lambda: shift.main([*flags, *words]))
        assert line in end.value.code and "\n" not in end.value.code

def test_shift_scores_do_not_depend_on_the_batch():
    it, psi = job(), shift.RejectionNetwork(64)
    x, one = it.x.repeat(7, 1, 1, 1), to_float(it.x[39:])  # rows 39 and, in another batch, 279
    whole, alone = (shift.score(it.net, {"psi": psi}, t, t[:, 0, 0, 0], 3) for t in (x, it.x[39:]))
    assert list(whole.scores) == ["MSP", "energy", "ODIN", "psi"]
    for name, values in whole.scores.items():
        assert torch.allclose(values[39::240], alone.scores[name].expand(2), atol=1e-5), name
    assert torch.equal(whole.y[39::240], alone.y.expand(2))
    assert torch.allclose(-psi(shift.feature(it.net, one)), alone.scores["psi"], atol=1e-5)

def test_shift_resumed_is_uninterrupted(tmp_path, monkeypatch):
    def run(folder, **changed):
        it = job(tmp_path / folder, resume=True, batch_size=8, steps=6, **changed)
        fakes = shift.make_fakes(it, "random", "patch", 0)
        before = {k: v.clone() for k, v in it.net.state_dict().items()}
        psi = shift.train_psi(it, "random", "patch", fakes, 1)
        assert all(torch.equal(v, before[k]) for k, v in it.net.state_dict().items())  # untouched
        return [fakes, *psi.parameters()]
    whole = run("whole")
    monkeypatch.setattr(train_gen, "SAVE_SECONDS", -1)
    for _ in range(4):  # each step of the fakes but the last, one a call
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(shift, "holes", interrupted_after(1, shift.holes))
            run("cut")
    for _ in range(5):  # then of psi; the fakes' last step is the first call's
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(shift, "rejection_loss", interrupted_after(1, shift.rejection_loss))
            run("cut")
    assert all(torch.equal(a, b) for a, b in zip(whole, run("cut"))) and len(whole[0]) == 40
    with pytest.raises(ValueError, match="finds no object"):  # nothing is large enough
        run("none", least=2.0)
