"""On-policy distillation: the student answers, teachers score its very tokens, and it is trained towards them.

    train.on_policy:  (answers ─▶ teachers' scores ─▶ π₀ ─▶ steps) × rounds ─▶ train/on_policy

The loss is in ``objectives/on_policy.py``. A round (``rounds.py``) takes the next prompts in an order that the seed
decides, asks the student as it is by then (``student.py``), has each teacher score the answers (``teachers.py``), and
computes log π₀ of their tokens under the model in training itself, in the batches, layout and dtype of the steps that
follow. So the importance weights are 1 at a round's first step, whatever drew the answers: ``generate`` and servers
compute in other orders than training does. What they draw differently is left uncorrected.

Several teachers: each scores the answers to prompts of its ``domains``. Where several teach a domain, a token's
log-ratio is the mean over them: the student is drawn to the geometric mean of the teachers.

The files of a round are ``train/on_policy.partial/rounds/NUMBER/``, each a folder with a file ``RANK.jsonl`` of every
process; a line is on the disk before the next is made, so a kill loses what is in flight:

    answers/          prompt, index, text, finish (``stop``, ``length``), tokens: the drawn ones, the end included
    teachers/NAME/    prompt, index, log_probs of these tokens, or of groups of them with ``groups``: the group of each
                      token (−1: none); or why: what keeps the teacher from scoring the answer, which is then left out
    drawn/            prompt, index, log_probs: log π₀

Steps are trained by transformers' trainer through all rounds; its checkpoints are those of the other trainings. A
resumed run goes on after the last one, and takes what later rounds have left from their files.

**log.jsonl** has what every training has (``train.py``), and of the tokens of the answers:

    round                       from 1
    reverse_kl                  mean of d, nats a token: an estimate of KL(student ‖ teacher)
    reverse_kl/NAME             of one teacher, where there are several
    advantage/mean, advantage/std
    ratio                       mean of the importance weights
    clipped                     share of tokens whose weights ``clip`` has bounded
    length/response             tokens of an answer
"""
