"""hptjax: post-training of language models as one gradient, with proof that it was summed."""
