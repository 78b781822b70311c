"""Networks and their weight files: zoo, stages, student, teachers and heads; no networks of a single method."""
