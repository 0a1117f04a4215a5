"""Study the method: programs, one a folder, that train small models and say whether they learn to think."""
