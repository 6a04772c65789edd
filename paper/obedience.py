"""A generator that shall obey its label: two more losses for train_gen.py.

    python -m paper.obedience --data FOLDER --run RUN --mismatched 0.5
    python -m paper.obedience --data FOLDER --run RUN --auxiliary 0.1 --reader RUN2
    python -m paper.intervene --run RUN --dev             # after train_scorer.py and evaluate.py

In Algorithm 1 G never sees a wrong label, so it may read the class off x_m and pass the label by.
Here it makes a second synthesis x'' = D(E(x_m), y') of every image under another label, which
nothing can be like: --mismatched weighs D^Unet's judgement of it in G's loss, and D^Unet has it as
one more fake; --auxiliary the cross-entropy of RUN2's classifier, of the same classes, at y'. All
other flags are train_gen.py's.
"""

from functools import cache

import torch
import torch.nn.functional as F

import train_gen
from moodcat import discriminator_loss, generator_loss, kl_divergence
from train_gen import SETTINGS, run_script
from train_scorer import load_classifier, mismatched

ROWS = dict(
    mismatched=(0.5, "of D^Unet's judgement under another label"),
    auxiliary=(0.0, "of the cross-entropy under another label"),
    reader=("none", "RUN2, whose classifier that is"))

def train_step(G, D, opt_g, opt_d, x, x_m, y, s):
    """train_gen.train_step with x'' beside x': images x, masked x_m (B, C, S, S), labels y (B,),
    settings s -> {name: loss}."""
    def run(net, *inputs):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=s.bf16):
            return [out.float() for out in net(*inputs)]

    # x' and x'', y and y'
    other = mismatched(y, G.settings["num_classes"])
    labels = torch.cat([y, other])
    fakes, mu, logvar = run(G, torch.cat([x_m, x_m]), labels)         # (2B, C, S, S), 2 x (2B, 128)
    x_fake, x_other = fakes.chunk(2)

    # (1) E and D: Eq. 6 and Eq. 1, and x'' shall be judged real, or read as y'
    D.requires_grad_(False)
    logits, pixels = run(D, fakes, labels)
    fake, fake_other = logits.chunk(2)
    fake_px, other_px = pixels.chunk(2)
    loss_g = generator_loss(fake, fake_px, x_fake, x, s.adv, s.l1, s.l2, s.ssim)
    loss_other = s.mismatched * (F.softplus(-fake_other).mean() + F.softplus(-other_px).mean())
    if s.auxiliary:
        loss_other = loss_other + s.auxiliary * F.cross_entropy(read(s.reader, s.device)(x_other), other)
    kl = kl_divergence(mu, logvar).mean()
    opt_g.zero_grad()
    (loss_g + loss_other + s.kl * kl).backward()
    opt_g.step()

    # (2) D^Unet, for which x'' is a fake where it judges it
    D.requires_grad_(True)
    shown = fakes.detach() if s.mismatched else x_fake.detach()
    logits, pixels = run(D, torch.cat([x, shown]), torch.cat([y, labels[:len(shown)]]))
    real, fake = logits.tensor_split([len(x)])
    real_px, fake_px = pixels.tensor_split([len(x)])
    loss_d = discriminator_loss(real, real_px, fake, fake_px)
    opt_d.zero_grad()
    loss_d.backward()
    opt_d.step()
    return dict(loss_g=loss_g.detach(), kl=kl.detach(), loss_d=loss_d.detach(),
                loss_other=loss_other.detach())

@cache
def read(run, device):
    """Another run's classifier. Raises OSError or ValueError."""
    classifier, _, _ = load_classifier(run, None, device)
    return classifier

def main(argv=None):
    """train_gen.py with this step and these flags."""
    SETTINGS.update(ROWS)
    train_gen.train_step = train_step
    train_gen.main(argv)

if __name__ == "__main__":
    run_script(main)
