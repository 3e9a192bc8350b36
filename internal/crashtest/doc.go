// Package crashtest proves what the gateway promises about crashes. FS is a vfs.FS held in memory
// that behaves as a disk with a volatile cache: it loses power, tears writes, fails syncs, fills up
// and rots, all by seed. Sched decides in which order the calls of all goroutines take effect, by seed as
// well. Model records what a pool of disks was asked to do and checks what a recovered pool shows against it.
// The histories that put them together are TestCrash of package pool; TestPlanted there shows that they
// find bugs.
//
// What FS keeps of one file, per 512-byte sector:
//
//	          Sync                  write           write
//	------------|---------------------|---------------|-----------> calls
//	 stable: S                     version 1       version 2 = visible
//	            '------ a power cut leaves any one of S, 1, 2 ------'
//
// A file's length has versions in the same way. Names are kept apart from data: creating, renaming
// and removing are pending operations until SyncDir of a folder they touch; a power cut keeps any
// subset of them. So a file whose data was synced may lose its name, and a name may stay without
// its data. Folders are names too: a new one needs SyncDir of its parent.
//
// A Sync that failed leaves what it should have covered visible but in doubt for good: a later Sync does
// not help, in this process or the next, only writing the bytes again does.
//
// A sector is the unit of atomicity: a write may tear between sectors, never inside one. toylog_test.go shows the
// package at work on a small log, and the planted bugs it finds.
package crashtest
