"""What is looked at before the first step: whether all ranks are alike, their hosts fit, and the fabric between them well."""
