// Package writeback keeps acknowledged writes on the local tier until a cut that holds them is
// published: the log, its index, the metadata log, local checkpoints, and recovery from them.
//
// A log file fills one slot of the tier. Everything is in 4 KiB blocks, integers are little-endian.
// docs/FORMATS.md draws every byte; in short:
//
//	slot-NNNNNN   | file header | batch | batch | …
//	batch         | header: fixed part, entries, one CRC per payload block | payload blocks |
//	entry         {kind, disk, lba, blocks}   DATA, UNMAP, OP; (DATAREF is reserved)
//	meta-NNNNNN   | file header | record | record | …      each synced before the next is written
//	ckpt-A, -B    | header | index of unpublished blocks | state of the pool |
//	identity      who the log is, written once
//
// Every checksum of a header is seeded with the log's term, drawn afresh at each open, and every
// header states its own place, so neither what an earlier lap left in a slot nor guest data that
// copies a header can pass for a batch. Block checksums are plain CRC32C: the cache keeps them.
//
// Invariants:
//   - seq rises by exactly one per record, across files; a record is visible, counted written and
//     counted stable only after all before it. Several batches may be in flight.
//   - a sync covers what was complete before it was issued, nothing more.
//   - a file gets its Sealed record only when all of it is stable, in file order; so the files
//     recovery must scan are those after the last Sealed record.
//   - a slot becomes clean only when its file is sealed and all its records are at or below the
//     committed horizon (Publish).
//   - after a failed write or sync of a file nothing more is written to it: its content is written into
//     a fresh one that takes its name and place, before anything else is built, shown or synced
//     (mend.go). If that cannot be done, the log stops (ErrFailed); reading goes on.
//   - what the file system refuses for want of space, or because it is read-only, is tried again until
//     it is taken; meanwhile appends wait, nothing is lost, and Health says why.
//
// # Index
//
// The index maps blocks to places, newest generation first. A generation is the net effect of the
// records between two freezes; per disk it has the data as runs and the unmapped ranges as holes:
//
//	generation ─ disk ─┬─ runs   {lba, blocks, place}, 16 bytes, sorted in leaves of at most 4 KiB
//	                   └─ holes  [start, end)
//	checksums  slot ─ one CRC per block of the file, until the slot is clean
//
// No entry holds a pointer and a leaf grows in steps of a fifth, so 1 GiB of random 4 KiB writes takes at
// most 6 MiB and of 64 KiB writes 1.5 MiB, checksums and room to grow included (IndexBytes).
//
// # Checkpoints
//
// FreezeAndRotate starts a new metadata file and then freezes the index at S, both under the
// metadata lock. A Sealed record in an older metadata file was written before, and its file was full
// by then, so all its records were in the index: they are at or below S. A Sealed record written
// later is in the new file and replayed; its records at or below S are skipped, since the checkpoint
// holds their net effect or they were published. The checkpoint is written only once the log is
// stable through S, and only after its header is synced are the older metadata files removed.
//
// Checkpoint does the same while nothing can be published, and ends no generation: when it is written,
// what came meanwhile is folded back into the generation that the freeze split off. So neither the
// metadata log nor the row of generations grows with the length of an outage.
//
// # Recovery
//
// Open reads the newest valid checkpoint, replays the metadata files from the one it names, and
// scans the files of the current term that have no Sealed record, in file order, up to the first
// batch that is not whole. If any header found beyond that claims a stable sequence at or above the
// missing one, the log is damaged and Open refuses; otherwise it is a torn tail, and the log ends
// there. Everything read that may not be stable is then written again and synced: the unsealed files
// above the highest stable mark, the header of the checkpoint and the last record of each metadata file,
// since a header is written after the sync of its payload and a record after the sync of the one before.
// The unsealed files are sealed, and a Term record starts the new term; a crash before that record
// leaves the old state, and files of the old term beyond the end are void after it. The index is built
// once, by DropThrough, from what the checkpoint held, as it is, and the records above it.
package writeback
