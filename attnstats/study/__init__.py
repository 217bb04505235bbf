"""The paper's study: a response, a corpus of them, couplings, perturbation, and where results are kept."""
