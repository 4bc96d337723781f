"""The mini world's videos: the questions of `mini.world.videos`, asked and scored like the `mini` benchmark's."""

from mllm_jax.evaluation.benchmarks.mini import Mini


class MiniVideo(Mini):
    """Questions {question_id, video, ability, group, question, options, answer} that no single frame answers."""

    name = "mini_video"
