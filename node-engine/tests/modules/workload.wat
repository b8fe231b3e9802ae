;; A workload for tests, by the first letter of its argument: `e` tells arguments and environment, `s` serves at its first socket, `f`
;; tries what it may do with files, `r` asks for the time and for chance, `m` takes all memory, `c` all of a CPU, `t` traps, `x` ends
;; with 7.
(module
  (import "wasi_snapshot_preview1" "args_sizes_get" (func $args_sizes_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "args_get" (func $args_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "environ_sizes_get" (func $environ_sizes_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "environ_get" (func $environ_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "clock_time_get" (func $clock_time_get (param i32 i64 i32) (result i32)))
  (import "wasi_snapshot_preview1" "random_get" (func $random_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_close" (func $fd_close (param i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_open"
    (func $path_open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "sock_accept" (func $sock_accept (param i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "sock_recv" (func $sock_recv (param i32 i32 i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "sock_shutdown" (func $sock_shutdown (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))

  ;; 0: a vector, 8: its result, 12: a descriptor, 16, 20: counts and sizes, 24: a time
  ;; 1024: pointers, 8192: texts, 16384: what was read
  (memory (export "memory") 1)
  (data (i32.const 100) "serving\n")
  (data (i32.const 120) "etc/greeting")
  (data (i32.const 140) "mnt/data/copy")
  (data (i32.const 160) "../order")
  (data (i32.const 200) "HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\nwasm\n")

  (func $vector (param $at i32) (param $length i32)
    (i32.store (i32.const 0) (local.get $at))
    (i32.store (i32.const 4) (local.get $length)))

  (func $write (param $to i32) (param $at i32) (param $length i32)
    (call $vector (local.get $at) (local.get $length))
    (call $must (call $fd_write (local.get $to) (i32.const 0) (i32.const 1) (i32.const 8))))

  ;; Ends with the error that an answer is.
  (func $must (param $error i32)
    (if (local.get $error) (then (call $proc_exit (local.get $error)))))

  ;; Texts at 8192, one a line.
  (func $tell (param $length i32)
    (local $at i32)
    (local.set $at (i32.const 8192))
    (block $done
      (loop $next
        (br_if $done (i32.ge_u (local.get $at) (i32.add (i32.const 8192) (local.get $length))))
        (if (i32.eqz (i32.load8_u (local.get $at))) (then (i32.store8 (local.get $at) (i32.const 10))))
        (local.set $at (i32.add (local.get $at) (i32.const 1)))
        (br $next)))
    (call $write (i32.const 1) (i32.const 8192) (local.get $length)))

  (func $surroundings
    (call $tell (i32.load (i32.const 20)))
    (call $must (call $environ_sizes_get (i32.const 16) (i32.const 20)))
    (call $must (call $environ_get (i32.const 1024) (i32.const 8192)))
    (call $tell (i32.load (i32.const 20))))

  (func $open (param $path i32) (param $length i32) (param $how i32) (param $rights i64) (result i32)
    (call $path_open (i32.const 3) (i32.const 1) (local.get $path) (local.get $length) (local.get $how)
      (local.get $rights) (i64.const 0) (i32.const 0) (i32.const 12)))

  ;; Copies one file, finds that it may not write it, and that there is no way out.
  (func $files
    (call $must (call $open (i32.const 120) (i32.const 12) (i32.const 0) (i64.const 2)))
    (call $vector (i32.const 16384) (i32.const 4096))
    (call $must (call $fd_read (i32.load (i32.const 12)) (i32.const 0) (i32.const 1) (i32.const 8)))
    (i32.store (i32.const 20) (i32.load (i32.const 8)))
    (call $write (i32.const 1) (i32.const 16384) (i32.load (i32.const 20)))
    (call $must (call $open (i32.const 140) (i32.const 13) (i32.const 9) (i64.const 64)))
    (call $write (i32.load (i32.const 12)) (i32.const 16384) (i32.load (i32.const 20)))
    (if (i32.eqz (call $open (i32.const 120) (i32.const 12) (i32.const 0) (i64.const 64)))
      (then (call $proc_exit (i32.const 98))))
    (if (i32.eqz (call $open (i32.const 160) (i32.const 8) (i32.const 0) (i64.const 2)))
      (then (call $proc_exit (i32.const 99)))))

  (func $time_and_chance
    (call $must (call $clock_time_get (i32.const 0) (i64.const 1) (i32.const 24)))
    (call $must (call $random_get (i32.const 16384) (i32.const 8)))
    (if (i64.lt_u (i64.load (i32.const 24)) (i64.const 1700000000000000000)) (then (call $proc_exit (i32.const 96))))
    (if (i64.eqz (i64.load (i32.const 16384))) (then (call $proc_exit (i32.const 97)))))

  ;; Up to an empty line.
  (func $request
    (local $length i32)
    (block $done
      (loop $next
        (call $vector (i32.add (i32.const 16384) (local.get $length)) (i32.const 1024))
        (br_if $done (call $sock_recv (i32.load (i32.const 12)) (i32.const 0) (i32.const 1) (i32.const 0)
          (i32.const 8) (i32.const 16)))
        (br_if $done (i32.eqz (i32.load (i32.const 8))))
        (local.set $length (i32.add (local.get $length) (i32.load (i32.const 8))))
        (br_if $done (i32.gt_u (local.get $length) (i32.const 8192)))
        (br_if $next (i32.lt_u (local.get $length) (i32.const 4)))
        (br_if $next
          (i32.ne (i32.load (i32.add (i32.const 16380) (local.get $length))) (i32.const 0x0a0d0a0d))))))

  (func $serve
    (call $write (i32.const 1) (i32.const 100) (i32.const 8))
    (loop $next
      (call $must (call $sock_accept (i32.const 3) (i32.const 0) (i32.const 12)))
      (call $request)
      (call $vector (i32.const 200) (i32.const 62))
      (drop (call $fd_write (i32.load (i32.const 12)) (i32.const 0) (i32.const 1) (i32.const 8)))
      (drop (call $sock_shutdown (i32.load (i32.const 12)) (i32.const 2)))
      (drop (call $fd_close (i32.load (i32.const 12))))
      (br $next)))

  (func $grow
    (loop $next
      (if (i32.eq (memory.grow (i32.const 16)) (i32.const -1)) (then (call $proc_exit (i32.const 95))))
      (br $next)))

  (func (export "_start")
    (local $letter i32)
    (call $must (call $args_sizes_get (i32.const 16) (i32.const 20)))
    (call $must (call $args_get (i32.const 1024) (i32.const 8192)))
    (if (i32.lt_u (i32.load (i32.const 16)) (i32.const 2)) (then (call $proc_exit (i32.const 64))))
    (local.set $letter (i32.load8_u (i32.load (i32.const 1028))))
    (if (i32.eq (local.get $letter) (i32.const 0x65)) (then (call $surroundings)))
    (if (i32.eq (local.get $letter) (i32.const 0x73)) (then (call $serve)))
    (if (i32.eq (local.get $letter) (i32.const 0x66)) (then (call $files)))
    (if (i32.eq (local.get $letter) (i32.const 0x72)) (then (call $time_and_chance)))
    (if (i32.eq (local.get $letter) (i32.const 0x6d)) (then (call $grow)))
    (if (i32.eq (local.get $letter) (i32.const 0x63)) (then (loop $for_ever (br $for_ever))))
    (if (i32.eq (local.get $letter) (i32.const 0x74)) (then unreachable))
    (if (i32.eq (local.get $letter) (i32.const 0x78)) (then (call $proc_exit (i32.const 7))))))
