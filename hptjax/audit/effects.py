"""What each finding of an audit does to training, one paragraph per code."""

from __future__ import annotations

EFFECTS: dict[str, str] = {
    "dropped": (
        "Some micro-batches never reach the parameters. The tokens are read, counted, paid for and then thrown away: "
        "the batch is smaller than configured, its gradient noisier, and the reported gradient norm too small, while "
        "losses, token counts and speed all look right. Adam hides the smaller size of the sum but not its noise."
    ),
    "repeated": (
        "Some micro-batches are added more than once, so their examples pull with a multiple of their weight and the "
        "window is no longer an average over its tokens."
    ),
    "stale": (
        "Gradients of an earlier window are applied again: the sums were not reset. Old examples keep pulling, in "
        "directions computed at parameters that no longer exist, as an unplanned momentum that grows with every "
        "window."
    ),
    "wrong_boundary": (
        "Micro-batches are applied, but in the update of another window: the boundary flag is off. Every update mixes "
        "gradients taken at two different parameter vectors, and normalisers counted for one window scale another."
    ),
    "mean_of_means": (
        "Each micro-batch is averaged over its own tokens and the averages are averaged. A token in a short "
        "micro-batch then weighs more than one in a long one, so short answers are over-trained, and the gradient "
        "depends on how the batch happened to be cut. It is right only where all micro-batches have equally many live "
        "tokens."
    ),
    "rank_means": (
        "Each data-parallel worker averages over its own tokens and the averages are averaged. A token weighs more on "
        "a worker that holds few of them, so the gradient depends on the number of workers and on how rows were dealt "
        "out."
    ),
    "sequence_mean": (
        "Each row is averaged over its own tokens first. Tokens of short rows weigh more than those of long rows. "
        "This may be the objective that you want, but it is not the mean over the tokens of the window that the job "
        "asks for."
    ),
    "extra_1_over_k": (
        "The sum is divided by the number of micro-batches once too often. The update shrinks as accumulation grows: "
        "with SGD the learning rate is silently divided by k; with Adam the epsilon, the clip threshold and the decay "
        "all meet gradients of another size."
    ),
    "missing_1_over_k": (
        "The sum is k times too large: a division by the number of micro-batches is missing. Loss and gradient grow "
        "with accumulation, clipping sets in where it should not, and with SGD the learning rate is silently "
        "multiplied by k."
    ),
    "extra_rank_factor": (
        "The gradient is divided by the number of data-parallel workers once too often, so adding workers lowers the "
        "effective learning rate."
    ),
    "missing_rank_factor": (
        "The gradient is multiplied by the number of data-parallel workers: it is summed over them where it should be "
        "averaged, or scaled twice. Adding workers raises the effective learning rate."
    ),
    "sum_not_mean": (
        "The gradients are summed and never divided by the number of live tokens. The size of an update depends on "
        "how long the answers are, and clipping decides in place of the learning rate."
    ),
    "padding_counted": (
        "The divisor counts padding or masked positions too. The more padding a batch holds, the smaller its update: "
        "the learning rate depends on the longest row."
    ),
    "wrong_scale": (
        "Every token has the same weight, but not the one asked for: the update is scaled by a factor that the job "
        "does not name. With SGD that is another learning rate; clipping and decay meet gradients of another size."
    ),
    "uneven_weights": (
        "Tokens of one window do not weigh the same, by a pattern that is none of the usual ones. The objective that "
        "is trained is not the mean over the tokens of the window."
    ),
    "tokens_dropped": (
        "Some live tokens have no weight although others of their micro-batch do: the loss mask is off or cut short. "
        "Typically the first or the last token of an answer is never learned, so models do not start or stop as "
        "taught."
    ),
    "masked_tokens_trained": (
        "Positions that are masked out move the parameters: the model is trained on prompts or padding, which dilutes "
        "and can reverse what the answers teach."
    ),
    "low_precision_sum": (
        "The sum over micro-batches is kept in a format with too few digits, such as bfloat16. Small gradients added "
        "to a large sum vanish; the more micro-batches, the more is lost, and the loss is systematic, not noise."
    ),
    "clip_before_sum": (
        "Each micro-batch is clipped by itself and the clipped gradients are added. Opposite outliers no longer "
        "cancel, the direction of the update changes, and the result depends on how the batch was cut."
    ),
    "clip_wrong": (
        "The update that comes out of clipping is not the summed gradient scaled to the clip norm: the threshold is "
        "compared with a gradient of another size, or not at all, so outlier batches hit with another force than "
        "planned."
    ),
    "schedule_per_micro_batch": (
        "The learning-rate schedule advances with every micro-batch instead of every update. Warm-up and decay run k "
        "times too fast, and most of a long run is trained at the final rate."
    ),
    "wrong_learning_rate": (
        "An update used another learning rate than the one scheduled for it, so the run that you compare with is not "
        "the run that you configured."
    ),
    "nan_poisoning": (
        "One NaN does not stay in its window: gradients of later, clean windows are NaN too, or the NaN reaches the "
        "parameters before its window is complete. A single bad micro-batch ends the run, hours may pass before "
        "anyone looks, and skipping the update afterwards cannot help because the accumulator itself is lost."
    ),
    "nan_applied": (
        "A NaN in one micro-batch is applied to the parameters. It is at least visible, but the model is lost from "
        "that update on: raise an error, or skip the window and say so."
    ),
    "nan_hidden": (
        "A micro-batch with a NaN is left out or zero-filled without a word and the rest of its window is applied. "
        "Data disappear unrecorded, and a trainer whose every second micro-batch overflows looks healthy."
    ),
    "nan_on_clean_data": (
        "The update is not finite although every gradient is. Typical is 0/0 where a micro-batch has no live token; "
        "one such micro-batch destroys the run."
    ),
    "after_nan_window": (
        "After a window with a NaN, clean windows are not applied as they should be: sums, counters or the schedule "
        "did not come back to where they were. Every later update is affected by one bad micro-batch."
    ),
    "update_before_window_end": (
        "Parameters move before the window is complete, so later micro-batches of a window are differentiated at "
        "other parameters than earlier ones: it is not accumulation of one gradient."
    ),
    "update_per_micro_batch": (
        "There is an update for every micro-batch: gradients are not accumulated. The batch is k times smaller than "
        "configured, and schedules that count updates run k times too fast."
    ),
    "final_window_dropped": (
        "The last window, which is shorter than the others, is not applied when training ends. Its examples are read "
        "and not learned from; some trainers carry them into the next epoch, and then only those of the last epoch are "
        "lost."
    ),
    "wrong_update_count": (
        "The number of updates is not the number of windows. Either gradients are applied at other moments than "
        "planned, or the target does not report the parameters after every update."
    ),
    "no_update": "The parameters do not move: the window is read and nothing of it is applied.",
    "weight_decay": (
        "Parameters that no token touches shrink: weight decay is on. The audit asks for none, because decay cannot "
        "be told from a gradient; check too that it acts once per update and not once per micro-batch."
    ),
    "momentum": (
        "Earlier windows act with a weight below one: momentum is on, or sums are only partly reset. The audit asks "
        "for plain SGD, because momentum cannot be told from a leak of old gradients."
    ),
    "not_sgd": (
        "Every parameter moves by the same amount whatever its gradient: an optimizer that normalises, such as Adam, "
        "is in use, and what the tokens weigh cannot be read. Give the target plain SGD, or pass --own-optimizer."
    ),
    "unexplained_change": (
        "Part of the change belongs to no token's gradient. Something beside the data moves the parameters: another "
        "loss term, noise, an average of weights, or an optimizer that is not plain SGD."
    ),
    "split_changes_update": (
        "The same tokens give another update when they are cut into micro-batches. The result of training depends on "
        "memory limits and on the number of workers, and runs with different splits are not comparable. Because the "
        "optimizer is the trainer's own, this comparison cannot name micro-batches, and a factor that the optimizer "
        "divides out, such as 1/k or the number of workers, cannot be seen in it at all."
    ),
    "blind": (
        "A micro-batch was blanked on purpose and nothing changed in what the target returned. What it returns does "
        "not depend on that micro-batch's data, so no other result of this audit means anything."
    ),
    "not_deterministic": (
        "The same job gave two different results. Differences between runs then say nothing about the code, and no "
        "result of this audit is certain."
    ),
    "not_examined": (
        "No window of three or more micro-batches was carried out and judged, so nothing is known about this trainer's "
        "accumulation: the bugs that live for years show with three micro-batches and not with two."
    ),
    "target_raised": "The target could not do the job: this probe, and what it protects from, stays unchecked.",
    "wrong_type": "What came back is not a list of arrays, so nothing can be read from it.",
    "wrong_shape": "What came back has another shape than the parameters, so nothing can be read from it.",
    "wrong_dtype": (
        "What came back is not in the number format asked for. Parameters held in few digits lose small updates "
        "altogether: a change below half of the last digit is no change."
    ),
    "same_array": (
        "The parameters after every update are one and the same array, changed in place, so only the last state can "
        "be seen. Copy the parameters after each update."
    ),
    "changed_its_input": (
        "The target changes the arrays of the job. A trainer that writes into its batches trains on other data in the "
        "next epoch."
    ),
}
