"""The train stage: SFT on the sources' best answers, then preference training, each to a complete model folder.

    pairs/sft.jsonl ─▶ train/sft ─▶ (the target's own answers, paired) pairs/preference.jsonl ─▶ train/preference

Training is ``transformers.Trainer``'s: ``accelerate launch -m mergekit_lite distill train RECIPE`` runs it on several
processes, with FSDP or DeepSpeed where accelerate is configured so. Everything of an unfinished stage lies in
``train/STAGE.partial/``: ``training.json``, ``checkpoint-STEP/``, ``reference/`` and ``log.jsonl``. A killed run goes
on from the last complete checkpoint. The finished folder is renamed to ``train/STAGE/`` and holds

    the model (weights in the recipe's dtype, config, generation config, tokenizer with its template)
    adapter/          with ``lora``: the adapter by itself, relative to the model that the stage started from;
                      the weights beside it have it merged in
    training.json     settings, counts of rows, versions
    log.jsonl         below

Both stages score the tokens of responses only, the end of the turn included. (WRPO's released SFT packed templated
text and trained on all of its tokens, prompts included.) A step is ``batch_size`` rows whatever the number of
processes; rows go round in a new order each epoch, and what doesn't fill a last batch is left out. SFT averages over
the tokens of a batch, preference training over its rows, without the model's dropout: the reference has none.

**log.jsonl**, a row for each logged step; a figure is the mean since the row before, over all processes:

    step, epoch          done so far
    loss, grad_norm, learning_rate
    length/response      SFT: tokens of the responses
    length/source, length/target, length/rejected           tokens of chosen responses by role, and of rejected ones
    rewards/source, rewards/target, rewards/rejected        as the objective has them (β·ρ for DPO and WRPO)
    accuracy             share of rows whose chosen rewards, taken together, are above the rejected one's
    accuracy/source, accuracy/target                        the same for the chosen responses of one role
    margin               chosen minus rejected reward
    alpha                the sources' share (``wrpo`` only)
    kl                   estimate of KL(reference ‖ model), nats a response: mean of −ρ over the target's own responses

A figure that no row of the step has (no response of that role, no reference) is left out.
"""
