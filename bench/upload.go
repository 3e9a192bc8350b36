package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"graindisk/backend"
	"graindisk/backend/local"
	"graindisk/pool"
	"graindisk/vdisk"
)

// uploadBytes is written sequentially and then published by the rows on uploading.
const uploadBytes = 1 << 30

// upload counts the processor time between a log full of data and its publication: reading it back,
// packing, checksums, 4+2 parity, and what the kernel does to store it in six directories. It counts
// everything asked of the targets too, from the first write until all is published.
func (b *bench) upload(ctx context.Context) error {
	user := row{Name: "CPU per GiB uploaded, 4+2, user", Unit: seconds, Target: 1.5}
	system := row{Name: "CPU per GiB uploaded, 4+2, system", Unit: seconds}
	asked := row{Name: "requests per GiB written, 4+2", Unit: count, Target: 210}
	const perGiB = float64(1<<30) / uploadBytes
	for range b.o.rounds {
		err := b.withPool(ctx, func(p *pool.Pool, d *vdisk.Disk, c *counter) error {
			before := c.n.Load()
			if err := writeAll(ctx, d); err != nil {
				return err
			}
			u0, s0 := ownCPU()
			if err := p.Publish(ctx); err != nil {
				return err
			}
			u1, s1 := ownCPU()
			user.Values = append(user.Values, (u1-u0).Seconds()*perGiB)
			system.Values = append(system.Values, (s1-s0).Seconds()*perGiB)
			asked.Values = append(asked.Values, float64(c.n.Load()-before)*perGiB)
			return nil
		})
		if err != nil {
			return err
		}
	}
	b.report.add(user)
	b.report.add(system)
	b.report.add(asked)
	return nil
}

// withPool opens a pool of six directories and a tier of its own in this process. It cuts only when
// asked to.
func (b *bench) withPool(ctx context.Context, use func(*pool.Pool, *vdisk.Disk, *counter) error) (err error) {
	dir, err := os.MkdirTemp(b.dir, "pool-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	c := new(counter)
	o := pool.Options{
		Name: "main", TierDir: filepath.Join(dir, "tier"), TierBytes: 4 * uploadBytes, Data: 4, Parity: 2,
		MaxDirtyAge: time.Hour, CutBytes: 2 * uploadBytes, CreateEmpty: true,
	}
	for i := range o.Data + o.Parity {
		name := fmt.Sprintf("t%d", i)
		s, err := local.Open(filepath.Join(dir, name), local.Options{Create: true})
		if err != nil {
			return err
		}
		o.Targets = append(o.Targets, pool.Target{Name: name, Store: counted{s, c}})
	}
	p, err := pool.Open(ctx, o)
	if err != nil {
		return err
	}
	d, err := p.CreateDisk(ctx, "d", uploadBytes)
	if err == nil {
		err = p.Publish(ctx) // of the disk's creation
	}
	if err == nil {
		err = use(p, d, c)
	}
	cctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), readyTimeout)
	defer cancel()
	if cerr := p.Close(cctx); err == nil {
		err = cerr
	}
	return err
}

func writeAll(ctx context.Context, d *vdisk.Disk) error {
	buf := noise()
	op := []vdisk.Op{{Kind: vdisk.OpWrite, Len: int64(len(buf)), Data: buf}}
	for off := int64(0); off < uploadBytes; off += int64(len(buf)) {
		op[0].Off = off
		if err := d.Write(ctx, op, false); err != nil {
			return err
		}
	}
	return nil
}

// ownCPU is what this process has used.
func ownCPU() (user, system time.Duration) {
	var u unix.Rusage
	unix.Getrusage(unix.RUSAGE_SELF, &u) // cannot fail with these arguments
	return time.Duration(u.Utime.Nano()), time.Duration(u.Stime.Nano())
}

// counter counts requests to all targets.
type counter struct{ n atomic.Int64 }

// counted is a store that counts what it is asked, whatever comes of it.
type counted struct {
	backend.Store
	c *counter
}

func (s counted) Put(ctx context.Context, key string, body []byte, c backend.Cond) (string, error) {
	s.c.n.Add(1)
	return s.Store.Put(ctx, key, body, c)
}

func (s counted) Get(ctx context.Context, key string, max int64) ([]byte, string, error) {
	s.c.n.Add(1)
	return s.Store.Get(ctx, key, max)
}

func (s counted) ReadAt(ctx context.Context, key string, p []byte, off int64) error {
	s.c.n.Add(1)
	return s.Store.ReadAt(ctx, key, p, off)
}

func (s counted) Stat(ctx context.Context, key string) (backend.Info, error) {
	s.c.n.Add(1)
	return s.Store.Stat(ctx, key)
}

func (s counted) Delete(ctx context.Context, key string) error {
	s.c.n.Add(1)
	return s.Store.Delete(ctx, key)
}

func (s counted) List(ctx context.Context, prefix, after string, max int) ([]backend.Info, bool, error) {
	s.c.n.Add(1)
	return s.Store.List(ctx, prefix, after, max)
}
