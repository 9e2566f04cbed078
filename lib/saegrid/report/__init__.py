"""Numbers as sentences, figures and pages, and the website and repository made of them."""
