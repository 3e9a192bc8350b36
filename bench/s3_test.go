package main

import (
	"context"
	"fmt"
	"testing"
	"time"

	"graindisk/backend"
	"graindisk/backend/probe"
	"graindisk/backend/s3"
)

// TestTheStoreOfTheBenchmarkIsFit has the store in memory prove what a gateway asks of one, and that its lines are as slow
// as they say, both ways.
func TestTheStoreOfTheBenchmarkIsFit(t *testing.T) {
	store, err := startS3()
	if err != nil {
		t.Fatal(err)
	}
	defer store.close()
	ctx := context.Background()
	var in [2]backend.Store
	for i := range in {
		in[i], err = s3.Open(ctx, s3.Options{
			Endpoint: store.url, Bucket: fmt.Sprintf("bucket-%d", i), Region: "us-east-1", PathStyle: true,
			AccessKey: "k", SecretKey: "s",
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	r, err := probe.Contract(ctx, in[0])
	if err == nil {
		err = r.Err()
	}
	if err != nil {
		t.Fatal(err)
	}
	store.setLines(map[string]*line{"bucket-0": {rate: 1e6}})
	begin, body := time.Now(), make([]byte, 1<<20)
	for i, s := range in {
		if _, err := s.Put(ctx, "a", body, backend.Cond{}); err != nil {
			t.Fatal(err)
		}
		if err := s.ReadAt(ctx, "a", body, 0); err != nil {
			t.Fatal(err)
		}
		// Two seconds, less the last piece each way: one passes when those before it are through.
		if took := time.Since(begin); i == 0 && took < 1500*time.Millisecond {
			t.Errorf("a MiB there and back at 1 MB/s took %v", took)
		}
	}
	store.empty("bucket-0")
	for i, s := range in {
		if objs, _, err := s.List(ctx, "", "", 10); err != nil || len(objs) != i {
			t.Errorf("bucket %d: %v, %v", i, objs, err)
		}
	}
}
