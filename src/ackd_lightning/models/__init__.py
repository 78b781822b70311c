"""Networks and their weight files: zoo, stages, student, teachers and heads; nothing that only one method uses."""
