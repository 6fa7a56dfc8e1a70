"""Description synthesis on a cluster: chunks of pairs, engines that describe them, what befell."""
