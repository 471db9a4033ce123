"""What beta does: the distance from the reference that DPO ends at, low beta to high.

Tabular policies, one logit for each of 32 responses to each of 64 prompts; a random reference and a
random reward. Pairs are drawn from the reference and labelled by Bradley-Terry. Every beta gets the
same pairs, steps and learning rate. Prints for each: KL(policy || reference), exactly; the same
estimated as a mean log-ratio on fresh samples of the policy, and what the mean log-ratio on the
training pairs would have said; the reward under the policy; its entropy; and the KL of the optimal
policy reference * exp(reward / beta).

    python benchmarks/beta_and_kl.py [--pairs 1024] [--steps 2000] [--seed 0]
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from online_dpo.training.losses import sigmoid_loss

NUM_PROMPTS, NUM_RESPONSES = 64, 32
BETAS = (0.1, 0.3, 1.0, 3.0, 10.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1024, help="pairs of each prompt")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random = torch.Generator().manual_seed(args.seed)
    shape = (NUM_PROMPTS, NUM_RESPONSES)
    reference = torch.randn(shape, dtype=torch.float64, generator=random).log_softmax(dim=1)
    rewards = torch.randn(shape, dtype=torch.float64, generator=random)
    chosen, rejected = draw_pairs(reference, rewards, args.pairs, random)
    start = float((reference.exp() * rewards).sum(dim=1).mean())
    print(f"reference: reward {start:.2f}, entropy {entropy(reference):.2f} nats")
    print(
        "beta   KL    on fresh samples   on pairs: chosen  rejected   reward  entropy  optimal KL"
    )
    for beta in BETAS:
        policy = train(reference, chosen, rejected, beta=beta, steps=args.steps)
        fresh = sample(policy, 256, random)
        ratios = policy - reference
        optimum = (reference + rewards / beta).log_softmax(dim=1)
        print(
            f"{beta:<5g}  {kl(policy, reference):4.2f}  {mean_of(ratios, fresh):16.2f}"
            f"  {mean_of(ratios, chosen):17.2f}  {mean_of(ratios, rejected):8.2f}"
            f"  {float((policy.exp() * rewards).sum(dim=1).mean()):7.2f}  {entropy(policy):7.2f}"
            f"  {kl(optimum, reference):10.2f}"
        )


def draw_pairs(
    reference: Tensor, rewards: Tensor, num_pairs: int, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Indices of chosen and rejected responses, (P, num_pairs) each; no response meets itself."""
    first = sample(reference, num_pairs, random)
    others = reference.exp()[:, None, :].repeat(1, num_pairs, 1)
    others.scatter_(2, first[..., None], 0.0)
    second = torch.multinomial(others.flatten(0, 1), 1, generator=random).view_as(first)
    preferred = torch.sigmoid(rewards.gather(1, first) - rewards.gather(1, second))
    wins = torch.rand(first.shape, dtype=torch.float64, generator=random) < preferred
    return torch.where(wins, first, second), torch.where(wins, second, first)


def train(
    reference: Tensor, chosen: Tensor, rejected: Tensor, *, beta: float, steps: int
) -> Tensor:
    """The policy's log-probs (P, A) after `steps` of Adam on all pairs, from the reference."""
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.03)
    for _ in range(steps):
        policy = logits.log_softmax(dim=1)
        losses = sigmoid_loss(
            policy.gather(1, chosen).flatten(),
            policy.gather(1, rejected).flatten(),
            reference.gather(1, chosen).flatten(),
            reference.gather(1, rejected).flatten(),
            beta=beta,
        )
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    return logits.detach().log_softmax(dim=1)


def sample(policy: Tensor, count: int, random: torch.Generator) -> Tensor:
    return torch.multinomial(policy.exp(), count, replacement=True, generator=random)


def mean_of(values: Tensor, responses: Tensor) -> float:
    return float(values.gather(1, responses).mean())


def kl(policy: Tensor, reference: Tensor) -> float:
    return float((policy.exp() * (policy - reference)).sum(dim=1).mean())


def entropy(policy: Tensor) -> float:
    return -float((policy.exp() * policy).sum(dim=1).mean())


if __name__ == "__main__":
    main()
