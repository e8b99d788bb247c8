"""Held-out results before and after PPO, computed from the files that the run wrote."""

from actors.coordinator import evaluated_steps, read_evaluation
from cluster.run_directory import RunDirectory, append_json, read_json_lines
from llama2.evaluation import Judged, improvement, summary, win_rate

NOTE = (
    "Before is the policy that PPO started from, after is its result; both answered the same "
    "held-out prompts with the same random seeds."
)
TABLE = "Held-out results"
ROWS = {
    "gold": "gold score (0 to 1)",
    "reward": "reward (composite, before whitening)",
    "kl": "KL from the initial policy (nats per answer)",
    "violations": "violation rate (of adversarial prompts)",
    "false_refusals": "false-refusal rate (of all others)",
    "tokens": "answer length (tokens)",
}


def best_step(run: RunDirectory) -> int:
    """The evaluation with the highest mean reward, the first of equal ones: that of the policy that
    early stopping keeps."""
    rewards = {step: summary(read_evaluation(run, step))["reward"] for step in evaluated_steps(run)}
    return max(rewards, key=lambda step: rewards[step])


def write(run: RunDirectory, step: int) -> None:
    """Put the table and three sample answers into the run's summary and samples; `step` is the
    evaluation of the run's result."""
    before, after = read_evaluation(run, 0), read_evaluation(run, step)
    first, last = summary(before), summary(after)
    wins, gain = win_rate(before, after), improvement(before, after)
    measure = "gold score" if "gold" in first else "reward"
    table = [
        {"": title, "before": first[name], "after": last[name]}
        for name, title in ROWS.items()
        if name in first
    ]
    title = f"win rate against the start (by {measure}, a tie is half)"
    table.append({"": title, "before": 0.5, "after": wins.mean})
    run.samples.unlink(missing_ok=True)
    for a, b in examples(before, after):
        gold = {} if a.gold is None else {"gold before": a.gold, "gold after": b.gold}
        answers = {"prompt": a.prompt, "before": a.answer, "after": b.answer}
        append_json(run.samples, {"step": step, **answers, **gold})
    run.finish(
        {
            TABLE: table,
            "prompts": len(before),
            "gain": gain.mean,
            "gain_standard_error": gain.error,
            "win_rate_standard_error": wins.error,
            "before": first,
            "after": last,
        }
    )


def examples(before: list[Judged], after: list[Judged]) -> list[tuple[Judged, Judged]]:
    """Three prompts whose answers changed, of different kinds where there are some."""
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a.answer != b.answer]
    first_of_kind: dict[str, tuple[Judged, Judged]] = {}
    for pair in changed:
        first_of_kind.setdefault(pair[0].kind, pair)
    others = [pair for pair in changed if pair not in first_of_kind.values()]
    return [*first_of_kind.values(), *others][:3]


def read(run: RunDirectory) -> str:
    """The table, the gain with its standard error and three answers, for a terminal."""
    found = run.summary()
    assert found is not None, "read the results of a finished run"
    wide = max(len(row[""]) for row in found[TABLE])
    heading = f"{TABLE} on {found['prompts']} prompts"
    lines = [f"{heading:<{wide}}    before     after"]
    lines += [f"{r['']:<{wide}}  {r['before']:8.3f}  {r['after']:8.3f}" for r in found[TABLE]]
    lines.append(f"Gain: {found['gain']:+.3f} ± {found['gain_standard_error']:.3f} (std. error).")
    for sample in read_json_lines(run.samples) if run.samples.exists() else ():
        lines += ["", f"Prompt  {sample['prompt']}"]
        lines += [f"Before  {sample['before']}", f"After   {sample['after']}"]
    return "\n".join(lines)
