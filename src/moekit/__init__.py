"""Fine-grained Mixture-of-Experts language models: plan, train, look inside, adapt, compress and run."""
