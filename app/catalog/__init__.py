"""The files that both planes read: which models and versions exist, what is known of them, and the samples that judge them. Serves and decides nothing."""
