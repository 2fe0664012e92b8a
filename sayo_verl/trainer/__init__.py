"""What knows verl's V1 trainer and TransferQueue. Imported by the launcher inside the task runner, not by workers."""
