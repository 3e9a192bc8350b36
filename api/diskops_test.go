package api

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"testing"
	"time"

	"graindisk/pool"
)

func (g *fakeGateway) DeletedDisks() []pool.DeletedDisk {
	return []pool.DeletedDisk{{Name: "old", ID: 3, Until: time.Unix(9, 0).UTC()}}
}

func (g *fakeGateway) DeleteDisk(_ context.Context, name string, o DeleteDisk) error {
	if _, err := g.Disk(name); err != nil {
		return err
	}
	if !o.Force {
		return fmt.Errorf("delete disk %s: %w", name, pool.ErrInUse)
	}
	delete(g.disks, name)
	return nil
}

func (g *fakeGateway) UndeleteDisk(_ context.Context, name string, o UndeleteDisk) (pool.DiskInfo, error) {
	return pool.DiskInfo{Name: o.As, ID: o.ID, Pool: name}, nil
}

func (g *fakeGateway) RenameDisk(_ context.Context, name string, o RenameDisk) (pool.DiskInfo, error) {
	return pool.DiskInfo{Name: o.To, Pool: fmt.Sprint(name, o.Force)}, nil
}

func (g *fakeGateway) ResizeDisk(_ context.Context, name string, o ResizeDisk) (pool.DiskInfo, error) {
	if !o.Shrink {
		return pool.DiskInfo{}, fmt.Errorf("resize disk %s: %w", name, pool.ErrShrink)
	}
	return pool.DiskInfo{Name: name, SizeBytes: o.SizeBytes}, nil
}

func (g *fakeGateway) Fsck(_ context.Context, name string, o Fsck) (pool.FsckReport, error) {
	if name != "main" {
		return pool.FsckReport{}, fmt.Errorf("pool %s: %w", name, ErrNoPool)
	}
	return pool.FsckReport{Pool: name, Segments: 5, Reclaimed: o.Orphans && o.Reclaim, Low: []string{"one"}}, nil
}

func TestOperationsOnDisksGoOverTheWire(t *testing.T) {
	c, _ := start(t)
	ctx := context.Background()
	for _, f := range []struct {
		what      string
		got, want any
		err       error
	}{
		result("resize", pool.DiskInfo{Name: "vm1", SizeBytes: 4096})(c.ResizeDisk(ctx, "vm1", ResizeDisk{4096, true})),
		result("rename", pool.DiskInfo{Name: "vm2", Pool: "vm1true"})(c.RenameDisk(ctx, "vm1", RenameDisk{"vm2", true})),
		result("undelete", pool.DiskInfo{Name: "b", ID: 3, Pool: "a"})(c.UndeleteDisk(ctx, "a", UndeleteDisk{3, "b"})),
		result("deleted", []pool.DeletedDisk{{Name: "old", ID: 3, Until: time.Unix(9, 0).UTC()}})(c.DeletedDisks(ctx)),
		result("fsck", pool.FsckReport{Pool: "main", Segments: 5, Reclaimed: true, Low: []string{"one"}})(c.Fsck(ctx, "main", Fsck{true, true})),
		result("delete", struct{}{})(struct{}{}, c.DeleteDisk(ctx, "vm1", DeleteDisk{Force: true})),
	} {
		if f.err != nil || !reflect.DeepEqual(f.got, f.want) {
			t.Errorf("%s: %+v %v, want %+v", f.what, f.got, f.err, f.want)
		}
	}
	if _, err := c.CreateDisk(ctx, NewDisk{Name: "vm1", SizeBytes: 1}); err != nil {
		t.Errorf("the name of the deleted disk: %v", err)
	}
	for what, f := range map[string]struct{ err, want error }{
		"in use":       {c.DeleteDisk(ctx, "vm1", DeleteDisk{}), pool.ErrInUse},
		"not there":    {c.DeleteDisk(ctx, "x", DeleteDisk{}), pool.ErrNoDisk},
		"would shrink": {second(c.ResizeDisk(ctx, "vm1", ResizeDisk{SizeBytes: 1})), pool.ErrShrink},
		"no pool":      {second(c.Fsck(ctx, "x", Fsck{})), ErrNoPool},
	} {
		if !errors.Is(f.err, f.want) {
			t.Errorf("%s: %v, want %v", what, f.err, f.want)
		}
	}
}

func result(what string, want any) func(any, error) struct {
	what      string
	got, want any
	err       error
} {
	return func(got any, err error) struct {
		what      string
		got, want any
		err       error
	} {
		return struct {
			what      string
			got, want any
			err       error
		}{what, got, want, err}
	}
}
