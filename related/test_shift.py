"""Offline, half a minute. Without transformers and diffusers, one test is skipped."""

import json
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train_gen
import train_scorer
from moodcat import Generator
from related import shift
from train_gen import run_script, to_float

def job(net="conv", **more):
    """What main() gathers, with random nets for 3 classes of 16 px."""
    torch.manual_seed(0)
    x, y = torch.randint(256, (40, 1, 16, 16), dtype=torch.uint8), torch.arange(40) % 3
    net = train_scorer.make_classifier(net, (8, 16, 32, 64), 3, 1).eval().requires_grad_(False)
    return SimpleNamespace(x=x, y=y, net=net, G=Generator(3, 2, 16, 1).eval(), device="cpu", seed=0,
                           classes=["cat", "car", "cow"], **more)

def test_check_values():
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
    rates = [round(shift.rate(epoch / 5), 6) for epoch in range(5)]
    assert rates == [0.01, 0.009045, 0.006545, 0.003455, 0.000955]

def test_threshold_dilation_and_images_without_an_object():
    P = torch.tensor([[[[-1.386295, -1.386293]]]]).double().sigmoid()  # 0.2 is between them
    assert shift.holes(P, 0.2, 1)[0].flatten().tolist() == [False, True]
    P = torch.zeros(3, 1, 352, 352)
    P[0, :, 100:150, 100:160] = 1
    P.flatten(1)[1, :2478] = P.flatten(1)[2, :2479] = 1  # 2% of 352 x 352 are 2478.08
    hole, there = shift.holes(P, 0.2, 25)
    assert hole[0].sum() == 6216 and hole[0, 0, 88:162, 88:172].all()
    assert there.tolist() == [True, False, True] and not shift.holes(P * 0, 0.2, 25)[1].any()

@pytest.mark.parametrize("name", ["conv", "resnet18"])
def test_the_cam_is_that_of_the_label_and_leaves_the_classifier_alone(name):
    it = job(name)
    before, x = {k: v.clone() for k, v in it.net.state_dict().items()}, to_float(it.x[:5])
    erase, P = shift.cam(it), shift.cam(it)(x, it.y[:5])
    assert P.min() >= 0 and P.max() <= 1 and (P != erase(x, it.y[1:6])).any()
    assert torch.allclose(erase(x[2:3], it.y[2:3]), P[2:3], atol=1e-4)  # of its image alone
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
    fakes = {name: shift.FILL[name](it)(x, hole, it.y) for name in ("zero", "patch", "generator")}
    for fake in fakes.values():
        assert torch.equal(fake[~hole], x[~hole]) and (fake != x)[hole].float().mean() > 0.9
    assert (fakes["zero"][hole] == -1).all() and fakes["generator"].abs().max() <= 1
    for image, inside, label in zip(fakes["patch"], hole, it.y):  # each of one other-class image
        donors = torch.stack([(d[inside] == image[inside]).all() for d in x])
        assert donors.any() and (it.y[donors] != label).all()

@torch.no_grad()
def test_tiny_random_clipseg_and_diffusion(tmp_path, monkeypatch):
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
    it = job(models=[str(tmp_path / "seg"), str(tmp_path / "sd")])
    for part, folder in zip((net, processor, pipe), [it.models[0], *it.models]):
        part.save_pretrained(folder)
    monkeypatch.setattr(shift, "SIDE", 64)
    monkeypatch.setattr(shift, "DIFFUSION_STEPS", 2)
    x, y = to_float(it.x[:3]), it.y[:3]
    P = shift.clipseg(it)(x, y)
    cow = dict(text=["A photo of a cow"], images=[it.x[2].expand(3, -1, -1)])
    want = net(**processor(**cow, return_tensors="pt")).logits.sigmoid().reshape(1, 1, 64, 64)
    assert P.shape == (3, 1, 16, 16) and torch.allclose(F.avg_pool2d(want, 4), P[2:], atol=1e-4)
    fake, hole = shift.diffusion(it)(x, P >= P.median(), y), P >= P.median()
    assert torch.equal(fake[~hole], x[~hole]) and (fake != x)[hole].all() and fake.abs().max() <= 1

def test_the_script_and_what_is_wrong_in_one_line(tmp_path, monkeypatch):
    run, other = str(tmp_path / "run"), str(tmp_path / "flat.pt")
    train_gen.main(["--run", run, "--steps", "2", "--known-classes", *"0123"])
    train_scorer.main(["--run", run, "--steps", "1", "--classifier-steps", "100"])
    identity = lambda: train_scorer.load_classifier(run, None, "cpu")[1]
    before, flags = identity(), ["--run", run, "--steps", "12"]
    read = lambda name: json.loads((tmp_path / "run" / name).read_text())
    shift.main([*flags, "--fill", "zero", "generator"])
    assert identity() == before  # never touched
    first = read("shift.json")["predicted_labels"]
    names = "SHIFT cam+zero", "SHIFT cam+generator", "SHIFT random+zero", "SHIFT random+generator"
    assert list(first) == ["MSP", "ODIN", "EBO", *names] and read("shift.json")["versions"]
    assert len({rows["unknown"]["accuracy"] for rows in first.values()}) == 1
    rows = dict(MSP=first["MSP"], cb=first["EBO"])  # evaluate.py's, of the same classifier
    (tmp_path / "run" / "results.json").write_text(json.dumps(dict(predicted_labels=rows)))
    shift.main([*flags, "--fill", "zero", "--fakes", "1", "2", "--dev", "4", "5"])
    dev = read("shift_dev.json")  # no test image
    assert dev["n"]["unknown"] == 242 and "SHIFT random+zero K=2" in dev["predicted_labels"]
    shift.main([*flags, "--fill", "zero"])
    again = read("shift.json")["predicted_labels"]
    assert list(again)[3] == "cb" and all(again[k] == {**rows, **first}[k] for k in again)
    torch.jit.script(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 4))).save(other)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for words, line in ((["--classifier", other], "spatial features"), (["--dev", "3"], "--dev"),
                        (["--fill", "diffusion"], "pip install"), (["--fakes", "0"], "--fakes")):
        with pytest.raises(SystemExit) as end:
            run_script(lambda: shift.main([*flags, *words]))
        assert line in end.value.code and "\n" not in end.value.code

def test_scores_do_not_depend_on_the_batch():
    it, psi = job(), shift.RejectionNetwork(64)
    x, one = it.x.repeat(7, 1, 1, 1), to_float(it.x[3:4])
    whole, alone = (shift.score(it.net, {"psi": psi}, t, t[:, 0, 0, 0], 3) for t in (x, x[3:4]))
    assert all(torch.allclose(whole[k][3:44:40], alone[k].expand(2), atol=1e-5) for k in whole)
    assert torch.allclose(-psi(shift.feature(it.net, one)), alone["psi"], atol=1e-5)

def test_resumed_is_uninterrupted(tmp_path, monkeypatch):
    def run(folder):
        it = job(run=str(tmp_path / folder), resume=True, bf16=False)
        fakes = shift.make_fakes(it, {}, "random", "patch", 0)
        return [fakes, *shift.train_psi(it, "psi", dict(steps=6, seed=0), fakes).parameters()]
    def cut(*words):
        for step, log in train_gen.training(*words):
            yield step, log
            signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(shift, "BATCH", 8)
    whole = run("whole")
    with monkeypatch.context() as patch:
        patch.setattr(shift, "training", cut)
        for _ in range(4 + 5):  # after each step of the fakes, then of psi
            with pytest.raises(SystemExit, match="--resume"):
                run("cut")
    assert all(torch.equal(a, b) for a, b in zip(whole, run("cut"))) and len(whole[0]) == 40
    monkeypatch.setitem(shift.LAMBDA, "random", 2.0)  # nothing is left to erase
    with pytest.raises(ValueError, match="finds no object"):
        run("none")
