"""What is published: the distribution, built and checked (`make release`), and the kernels for Hugging Face's hub.

docs/release.md has the steps.
"""
